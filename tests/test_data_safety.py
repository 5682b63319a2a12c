"""Personal data: everything that checks out is masked, everything that only looks so is not."""

import datetime
import itertools
import string

import pytest
from hypothesis import example, given, settings, strategies as st

from internjax.data.safety import FINDERS, find_pii, gb11643, gb11643_check, luhn, mask_pii
from internjax.errors import UserError

DIGITS = st.text(string.digits, min_size=14, max_size=14)


def kinds(text: str) -> list[str]:
    return [span.kind for span in find_pii(text, ["card", "ip"])]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+x@mail.uni-koeln.de.", "write to [EMAIL]."),
        ("<bob_1@a-b.co>, eve@x.org", "<[EMAIL]>, [EMAIL]"),
        ("card 4111 1111 1111 1111.", "card [CARD]."),
        ("5555-5555-5555-4444 or 378282246310005", "[CARD] or [CARD]"),
        ("身份证11010519491231002X，住在北京", "身份证[CHINA_ID]，住在北京"),
        ("from 8.8.8.8, 2001:4860:4860::8888", "from [IP], [IP]"),
        ("call +1 415 555 2671 now", "call [PHONE] now"),
        ("电话：13912345678。", "电话：[PHONE]。"),
        ("(415) 555-2671", "[PHONE]"),
        ("+86 10 6552 9988", "[PHONE]"),
        ("+44 20 7946 0958", "[PHONE]"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str):
    assert mask_pii(text)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com and root@localhost and a@b.test",
        "decorators like @dataclass, git@ and a@b",
        "package name@1.2.3 of npm",
        "4111 1111 1111 1112 has a wrong check digit",
        "0000 0000 0000 0000",
        "11010519491231002Y 110105194912310021 990105194912310021",
        "127.0.0.1, 10.0.0.1, 192.168.1.1, ::1, fe80::1, 224.0.0.1, 192.0.2.7, 0.0.0.0",
        "version 1.2.3.400, section 8.8.8.8.8, time 12:34:56, a::b::c",
        "JAX 0.12.0.1 and numpy 2.5.5",
        "Debian Policy version 4.6.2.0, policy 2.2.0.0, zlib 1:1.2.3.3.dfsg-1",
        "8.6.3.1. The symbols file\n* 5.6.31.2 Remarks",
        "driver version 91.198.174.192",
        "on 2024-05-31 at 10:30:00, 2024/05/31, 31.05.2024",
        "x = 1234567890; loss 0.123456789012",
        "2147483648 bytes, 49152 tokens, 1415926535897932",
        "sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "ISBN 978-3-16-148410-0",
        "pi is 3.14159265358979",
        "1 2 3 4 5 6 7 8 9 10 11 12",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str):
    assert mask_pii(text) == (text, {})


@given(DIGITS)
@settings(deadline=None)
def test_exactly_one_check_digit_makes_a_card(stem: str):
    right = [d for d in string.digits if luhn("4" + stem + d)]
    assert len(right) == 1
    for d in string.digits:
        number = "4" + stem + d
        assert ("card" in kinds(f"no {number} .")) == (d == right[0])


@given(DIGITS, st.integers(0, 14))
def test_luhn_sees_every_single_digit_error(stem: str, place: int):
    number = next(stem + d for d in string.digits if luhn(stem + d))
    wrong = number[:place] + str((int(number[place]) + 1) % 10) + number[place + 1 :]
    assert luhn(number) and not luhn(wrong)


@given(st.dates(datetime.date(1900, 1, 1)), st.integers(0, 999), st.sampled_from("0123456789X"))
def test_an_identity_number_has_one_check_character(born: datetime.date, order: int, check: str):
    stem = f"310112{born:%Y%m%d}{order:03d}"
    assert gb11643(stem + check) == (check == gb11643_check(stem))
    assert not gb11643("99" + (stem + check)[2:]), "no province has number 99"


def test_an_identity_number_has_a_possible_birthday():
    stem = "11010119990230123"
    assert not gb11643(stem + gb11643_check(stem)), "there is no 30 February"


@settings(deadline=None)
@given(st.ip_addresses())
def test_only_public_addresses_are_masked(address):
    found = kinds(f"host {address} up")
    assert ("ip" in found) == (address.is_global and not address.is_multicast)


@settings(deadline=None, max_examples=50)
@given(st.text(), st.text())
@example("", "4111 1111 1111 1111")
def test_masking_twice_changes_nothing_and_counts_are_true(before: str, after: str):
    text = f"{before} jane@mail.de 91.198.174.192 {after}"
    masked, counts = mask_pii(text)
    assert "jane@mail.de" not in masked
    assert sum(counts.values()) >= len(find_pii(text)) >= 2
    spans = find_pii(text)
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    again, more = mask_pii(masked)
    assert (again, more) == (masked, {})


def test_a_tag_is_no_hint_and_a_link_is_none_for_what_follows_it():
    text = "see http://8.8.8.8/x and (http://lists.org/) 12.2.1.1. Rules"
    assert mask_pii(text) == (
        "see http://[IP]/x and (http://lists.org/) 12.2.1.1. Rules",
        {"ip": 1},
    )


def test_kinds_can_be_chosen():
    text = "a@b.de 91.198.174.192"
    assert mask_pii(text, ["ip"])[0] == "a@b.de [IP]"
    assert mask_pii(text, []) == (text, {})
    with pytest.raises(UserError, match=r"'mail'.*email"):
        find_pii(text, ["mail"])
    assert set(FINDERS) == {"email", "china_id", "card", "ip", "phone"}
