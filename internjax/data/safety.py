"""Personal data: patterns propose, validators decide, tags replace.

A number is masked because it checks out (Luhn, GB 11643, a numbering plan, a public address), not
because it looks like one: manuals are full of versions, ports and sizes.
"""

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from internjax.errors import UserError


@dataclass(frozen=True)
class Span:
    """Personal data at characters `start` to `end`."""

    kind: str
    start: int
    end: int


EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9](?:[\w.+%-]{0,62}[\w+%-])?@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])",
    re.A,
)
# Names reserved for examples (RFC 2606, RFC 6761) belong to nobody.
RESERVED = re.compile(r"(^|[@.])(example\.(com|net|org)|example|test|invalid|localhost)$", re.I)
# Groups of digits; a card is one group of 13 to 19, or several of 3 to 6 (4-4-4-4, 4-6-5).
DIGITS = re.compile(r"(?<![\w.])\d{3,19}(?:[ -]\d{3,19})*(?!\w|\.\d)")
CHINA_ID = re.compile(r"(?<![0-9A-Za-z])[1-9]\d{16}[0-9Xx](?![0-9A-Za-z])")
IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)")
# What stands within 40 characters before an address, and before a version or section number.
NETWORK = re.compile(
    r"\b(?<!\[)(ip|address|hosts?|servers?|dns|gateway|ping|ssh|from|route|client|peer|network)\b"
    r"|://[^\s/]*$|地址|服务器|主机",
    re.I,
)
VERSION = re.compile(r"\b(version|release|section|chapter|policy|v)\W{0,3}$|[§版本章节]\W?$", re.I)
SMALL = 32  # parts of version and section numbers are below this
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
PHONE = re.compile(r"(?<![\w.])(?:\+|\(?\d)[\d ().\u2011/-]{5,20}\d(?![\w])")


def find_email(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Addresses whose domain is not reserved for examples."""
    for match in EMAIL.finditer(text):
        if ".." not in match[0] and not RESERVED.search(match[0]):
            yield Span("email", *match.span())


def find_card(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Payment cards (ISO/IEC 7812): digits of a known issuer range with a right Luhn sum."""
    for run in DIGITS.finditer(text):
        groups = list(re.finditer(r"\d+", run[0]))
        for i, first in enumerate(groups):
            for last in groups[i : i + 5]:
                digits = re.sub(r"\D", "", run[0][first.start() : last.end()])
                if 13 <= len(digits) <= 19 and _issuer(digits) and luhn(digits):
                    yield Span("card", run.start() + first.start(), run.start() + last.end())


def find_china_id(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Resident identity numbers: province, birth date and check character right (GB 11643-1999)."""
    for match in CHINA_ID.finditer(text):
        if gb11643(match[0].upper()):
            yield Span("china_id", *match.span())


def find_ip(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Public addresses; loopback, private, link-local and documentation ranges identify nobody."""
    for pattern in (IPV4, IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            public = address.is_global and not address.is_multicast
            if public and not _numbering(
                text[max(0, match.start() - 40) : match.start()], match[0]
            ):
                yield Span("ip", *match.span())


def _numbering(before: str, number: str) -> bool:
    """Whether four dotted numbers are rather a version or section: in a policy manual nearly all
    public-looking addresses are."""
    if ":" in number:
        return False
    small = max(map(int, number.split("."))) < SMALL
    return bool(VERSION.search(before)) or (small and not NETWORK.search(before))


def find_phone(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Numbers that are valid in the plan of one of the regions, or anywhere when written with +.

    Without + a number must be grouped the way its plan writes it or be a mobile number of 11 digits
    (mainland China), else every long number would be somebody's.
    """
    if not PHONE.search(text):
        return
    import phonenumbers
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in regions:
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.VALID, max_tries=2**31):
            raw, number = match.raw_string, match.number
            mobile = number.country_code == 86 and re.fullmatch(r"1[3-9]\d{9}", raw)
            grouped = len(re.split(r"[ ()./-]+", raw.strip("()"))) >= 3
            dotted = re.fullmatch(r"[\d.]+", raw) and "." in raw  # a version, a section number
            date = re.fullmatch(r"(19|20)\d\d[-/. ]\d{1,2}[-/. ]\d{1,2}.*", raw)
            certain = raw.startswith("+") or mobile or (grouped and not dotted and not date)
            if certain and phonenumbers.is_valid_number(number):
                yield Span("phone", match.start, match.end)


Finder = Callable[[str, Sequence[str]], Iterator[Span]]
# In order of trust: where two overlap, the earlier kind wins.
FINDERS: dict[str, Finder] = {
    "email": find_email,
    "china_id": find_china_id,
    "card": find_card,
    "ip": find_ip,
    "phone": find_phone,
}
TAGS = {kind: f"[{kind.upper()}]" for kind in FINDERS}


def find_pii(
    text: str, kinds: Sequence[str] = tuple(FINDERS), regions: Sequence[str] = ("US", "CN")
) -> list[Span]:
    """Returns the personal data in a text, in order and without overlaps.

    Args:
      kinds: which of email, china_id, card, ip, phone to look for.
      regions: ISO 3166 countries whose phone numbers are known without a country code.
    """
    if unknown := [kind for kind in kinds if kind not in FINDERS]:
        raise UserError(f"no kind of personal data {unknown[0]!r}: legal are {', '.join(FINDERS)}.")
    taken: list[Span] = []
    for kind in FINDERS:
        if kind in kinds:
            for span in FINDERS[kind](text, regions):
                if all(span.end <= t.start or span.start >= t.end for t in taken):
                    taken.append(span)
    return sorted(taken, key=lambda span: span.start)


def mask_pii(
    text: str, kinds: Sequence[str] = tuple(FINDERS), regions: Sequence[str] = ("US", "CN")
) -> tuple[str, dict[str, int]]:
    """Returns the text with personal data replaced by tags such as [EMAIL], and counts by kind.

    Repeats until nothing is found: a number beside another may come to light when that one is gone.
    """
    counts: dict[str, int] = {}
    while spans := find_pii(text, kinds, regions):
        parts, at = [], 0
        for span in spans:
            parts += [text[at : span.start], TAGS[span.kind]]
            counts[span.kind] = counts.get(span.kind, 0) + 1
            at = span.end
        text = "".join([*parts, text[at:]])
    return text, counts


def luhn(digits: str) -> bool:
    """Whether the last digit is right: every second from the right doubled, sum divisible by 10."""
    doubled = (int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits)))
    return sum(x - 9 if x > 9 else x for x in doubled) % 10 == 0


def gb11643(number: str) -> bool:
    """Whether 18 characters are a Chinese identity number: province, date, ISO 7064 MOD 11-2."""
    # 11-15 north, 21-23 northeast, 31-37 east, 41-46 south, 50-54 southwest, 61-65 northwest,
    # 71 Taiwan, 81-83 Hong Kong, Macau and Taiwan residence permits, 91 abroad.
    province = int(number[:2])
    legal = {*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55)}
    if province not in legal | {*range(61, 66), 71, 81, 82, 83, 91}:
        return False
    try:
        born = datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    return born.year >= 1850 and number[17] == gb11643_check(number[:17])


def gb11643_check(digits: str) -> str:
    """Returns the check character of 17 digits: weights 2**(17-i) mod 11."""
    total = sum(int(d) * (2 ** (17 - i) % 11) for i, d in enumerate(digits))
    return "10X98765432"[total % 11]


def _issuer(digits: str) -> bool:
    """Whether a card number starts and is long as those of Visa, Mastercard, Amex, UnionPay, JCB,
    Discover or Diners Club."""
    two, four, n = int(digits[:2]), int(digits[:4]), len(digits)
    return (
        (digits[0] == "4" and n in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and n == 16)
        or (two in (34, 37) and n == 15)
        or (two == 62 and 16 <= n <= 19)
        or (3528 <= four <= 3589 and 16 <= n <= 19)
        or ((four == 6011 or two in (64, 65)) and 16 <= n <= 19)
        or ((two in (36, 38, 39) or 3000 <= four <= 3059) and 14 <= n <= 19)
    )
