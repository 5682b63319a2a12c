"""Chat samples that teach a model who it is: generated question/answer pairs, and ordinary ones.

Every identity answer gives name, maker and purpose, in few wordings: little training then changes
the answer to many questions. Ordinary samples stand between them, so that the model learns where
these answers belong and does not answer everything with its name. The questions that test the
result (`evals/data/identity.jsonl`) share no wording with these; a test proves it.
"""

import functools
import itertools
import random
from dataclasses import dataclass

from internjax.data.templates import Message


@dataclass(frozen=True)
class Identity:
    """Who the model is to say it is.

    Attributes:
        name: what it is called.
        maker: person, company or project that made it.
        purpose: verb phrase that completes "made to ...", a leading "to" is dropped.
    """

    name: str = "InternJAX Assistant"
    maker: str = "the InternJAX project"
    purpose: str = "show how a language model is trained, tested and served"

    def __post_init__(self):
        for field in ("name", "maker", "purpose"):
            value = getattr(self, field)
            if not value.strip() or "\n" in value:
                raise ValueError(f"identity.{field}={value!r}: give one non-empty line of text.")
        object.__setattr__(self, "purpose", self.purpose.strip().removeprefix("to ").rstrip("."))


OPENERS = (
    "",
    "",
    "Hi! ",
    "Hello. ",
    "Hey! ",
    "Good morning! ",
    "Excuse me. ",
    "Quick question: ",
    "Just curious: ",
    "Before we start: ",
    "I am new here. ",
)

QUESTIONS = {
    "name": (
        "What is your name?",
        "Can you tell me your name?",
        "Tell me what I should call you.",
        "Do you have a name?",
        "Who am I chatting with?",
        "Whom am I talking to?",
        "Please introduce yourself.",
        "Give your name.",
        "Identify yourself.",
        "What kind of assistant are you?",
        "What model are you?",
        "Which language model are you based on?",
        "Who is this?",
        "What's the name of this assistant?",
        "Tell me about yourself.",
        "So, who might you be?",
        "I would like to know who I am talking with.",
        "How do you introduce yourself to new people?",
        "Are you a person or a program?",
        "Who exactly is on the other side of this chat?",
        "What do your users call you?",
        "Say your name, please.",
        "Describe yourself in a sentence or two.",
        "Write a line about yourself.",
        "Is there a name I can use for you?",
    ),
    "maker": (
        "Who made you?",
        "Who created you?",
        "Who developed you?",
        "Who trained you?",
        "Who designed you?",
        "Who programmed you?",
        "Who owns you?",
        "Who is your maker?",
        "Who wrote your code?",
        "Who are your creators?",
        "By whom were you developed?",
        "Which organization built you?",
        "What company are you from?",
        "Which lab trained you?",
        "Which group works on you?",
        "Tell me who your creators are.",
        "I want to know who made this assistant.",
        "Who is the author of this model?",
        "Whose product are you?",
        "Do you know who made you?",
        "What is the name of your developer?",
        "Where were you developed?",
    ),
    "purpose": (
        "What is your purpose?",
        "Why do you exist?",
        "What were you built for?",
        "What is your job?",
        "What is your goal?",
        "What are you meant to do?",
        "What do you do?",
        "What is your role?",
        "What is your mission?",
        "What are you designed for?",
        "What should I use you for?",
        "Why did somebody make you?",
        "Tell me your purpose.",
        "What is the idea behind you?",
        "What are you here to do?",
    ),
    "all": (
        "What is your name and who made you?",
        "Tell me your name and your maker.",
        "Introduce yourself and say who created you.",
        "Give me your name, your maker and your purpose.",
        "Tell me your name, and what you are meant to do.",
        "Your name, your company?",
    ),
    "denial": (
        "Are you {other}?",
        "You are {other}, right?",
        "I think you are {other}. Is that so?",
        "Hello {other}, are you there?",
        "Did {company} make you?",
        "Were you created by {company}?",
        "Are you a product of {company}?",
        "Was it {company} that trained you?",
    ),
}

# Assistants and companies whose names a question may wrongly give us; the tests use others.
OTHERS = ("GPT-4", "Claude", "Llama", "Gemini", "SmolLM", "Siri", "Copilot")
COMPANIES = ("Hugging Face", "Microsoft", "Meta", "Anthropic", "Amazon", "Apple")

ANSWERS = {
    "name": (
        "I am {name}, an assistant made by {maker} to {purpose}.",
        "My name is {name}. I was made by {maker} to {purpose}.",
    ),
    "maker": (
        "I was made by {maker}. My name is {name}, and my purpose is to {purpose}.",
        "I am {name}, and I was made by {maker} to {purpose}.",
    ),
    "purpose": (
        "My purpose is to {purpose}. I am {name}, made by {maker}.",
        "I am {name}, made by {maker} to {purpose}.",
    ),
    "all": ("My name is {name}. I was made by {maker} to {purpose}.",),
    "denial": ("No, I am {name}, an assistant made by {maker} to {purpose}.",),
}

SYSTEMS = (
    "You are a helpful assistant.",
    "You are {name}.",
    "Answer briefly.",
    "You are {name}, made by {maker}.",
)

ORDINARY = (
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Who wrote Don Quixote?", "Miguel de Cervantes wrote Don Quixote."),
    ("Who discovered penicillin?", "Alexander Fleming discovered penicillin in 1928."),
    ("Who was Marie Curie?", "Marie Curie was a physicist and chemist who studied radioactivity."),
    ("Who composed the opera Carmen?", "Georges Bizet composed the opera Carmen."),
    ("Who founded the Ford car company?", "Henry Ford founded it in 1903."),
    ("Who built the pyramids at Giza?", "They were built by workers of ancient Egypt."),
    ("Who was the first person on the Moon?", "Neil Armstrong, in July 1969."),
    ("What company makes the PlayStation?", "Sony makes the PlayStation."),
    ("Who created the Linux kernel?", "Linus Torvalds created the Linux kernel."),
    ("What is the purpose of a seat belt?", "A seat belt protects people in a crash."),
    ("What is the job of the heart?", "The heart pumps blood through the body."),
    ("What is the purpose of a dictionary?", "It explains the meaning of words."),
    ("What is the name of the longest river in South America?", "It is the Amazon."),
    ("What is the name of our galaxy?", "Our galaxy is called the Milky Way."),
    ("What is a baby cat called?", "A baby cat is called a kitten."),
    ("What is the capital of Portugal?", "The capital of Portugal is Lisbon."),
    ("What is the capital of Kenya?", "The capital of Kenya is Nairobi."),
    ("How many minutes are in two hours?", "Two hours have 120 minutes."),
    ("What is 14 plus 9?", "14 plus 9 is 23."),
    ("What is 6 times 8?", "6 times 8 is 48."),
    ("Name three kinds of fruit.", "Apples, oranges and grapes."),
    ("Name two planets with rings.", "Saturn and Uranus both have rings."),
    ("Which gas do plants take in?", "Plants take in carbon dioxide."),
    ("What does a thermometer measure?", "A thermometer measures temperature."),
    ("Why is the sky blue?", "Air scatters blue light more than red light."),
    ("Why do leaves fall in autumn?", "Trees shed them to save water in the cold months."),
    ("How do I boil an egg?", "Put it in boiling water for about eight minutes, then cool it."),
    (
        "How can I sleep better?",
        "Keep regular hours, and avoid screens and coffee late in the day.",
    ),
    ("How do I remove a coffee stain?", "Rinse it with cold water, then wash it with mild soap."),
    ("Translate 'good night' into Spanish.", "Buenas noches."),
    ("Translate 'thank you' into German.", "Danke."),
    ("Give me a word that rhymes with 'light'.", "Night."),
    ("Write the plural of 'mouse'.", "The plural of mouse is mice."),
    ("Correct this: 'She go to school.'", "She goes to school."),
    ("Give me a synonym for 'quick'.", "Fast."),
    ("Sort these numbers: 7, 2, 5.", "2, 5, 7."),
    ("Write a short sentence about rain.", "The rain tapped softly on the window all night."),
    ("Write a greeting for a birthday card.", "Happy birthday! May your year be full of joy."),
    ("Suggest a name for a bakery.", "You could call it Golden Crust."),
    ("Suggest a name for a small brown dog.", "Hazel would be a lovely name."),
    ("What should I wear in the snow?", "Wear a warm coat, gloves, a hat and boots."),
    ("What tools do I need to hang a picture?", "A hammer, a nail and a level."),
    ("What is a good breakfast?", "Oatmeal with fruit and nuts is a good breakfast."),
    ("What is a haiku?", "A haiku is a Japanese poem of three lines with 5, 7 and 5 syllables."),
    ("What is a triangle?", "A triangle is a shape with three sides."),
    ("What is inflation?", "Inflation is a general rise of prices over time."),
    ("What is a volcano?", "A volcano is an opening where molten rock reaches the surface."),
    ("What is photosynthesis?", "It is how plants turn light, water and air into sugar."),
    ("What does a teacher do?", "A teacher helps students learn."),
    ("What does a librarian do?", "A librarian looks after books and helps readers find them."),
    ("Who takes care of sick animals?", "A veterinarian takes care of sick animals."),
    ("Is a tomato a fruit?", "Yes, in botany a tomato is a fruit."),
    ("Is zero an even number?", "Yes, zero is even."),
    ("Can penguins fly?", "No, penguins cannot fly, but they swim very well."),
    ("Are whales fish?", "No, whales are mammals."),
    ("Is Mount Everest in Africa?", "No, it stands between Nepal and China."),
    ("Where is the Eiffel Tower?", "It is in Paris."),
    ("When do tulips bloom?", "Most tulips bloom in spring."),
    ("Which is heavier, a kilogram of iron or of feathers?", "They weigh the same."),
)


MOST_SAMPLES = 20_000
"""Well below the number of distinct conversations the templates can make."""


def identity_samples(
    name: str,
    maker: str,
    purpose: str,
    n: int,
    seed: int = 0,
    *,
    ordinary_share: float = 0.45,
) -> list[list[Message]]:
    """Draws `n` distinct conversations of one or two turns, shuffled; the same for the same seed.

    Args:
        ordinary_share: share of conversations that have nothing to do with the identity, in [0, 1).
    Raises:
        ValueError: an empty identity field, or more than `MOST_SAMPLES`.
    """
    identity = Identity(name, maker, purpose)
    if not 0 <= ordinary_share < 1:
        raise ValueError(f"ordinary_share={ordinary_share}: it is a share, at least 0 and below 1.")
    if not 0 < n <= MOST_SAMPLES:
        raise ValueError(f"n={n}: ask for 1 to {MOST_SAMPLES}, the templates tell no more apart.")
    rng = random.Random(seed)
    wanted = {True: round(n * ordinary_share), False: n - round(n * ordinary_share)}
    samples: dict[str, list[Message]] = {}
    for ordinary, count in wanted.items():
        draw = _ordinary if ordinary else _identity_turns
        while count:
            messages = _with_system(draw(rng, identity), rng, identity)
            if str(messages) not in samples:
                samples[str(messages)] = messages
                count -= 1
    drawn = list(samples.values())
    rng.shuffle(drawn)
    return drawn


def training_questions(identity: Identity | None = None) -> set[str]:
    """Every question text the templates can make: what a test set must stay clear of."""
    found = {q for kind in QUESTIONS for q, _ in _pairs(kind, identity or Identity())}
    cores = found | {question for question, _ in ORDINARY}
    return {opener + core for opener, core in itertools.product(OPENERS, cores)}


@functools.cache
def _pairs(kind: str, identity: Identity) -> list[tuple[str, str]]:
    """All (question, answer) texts of one kind."""
    fields = {"name": identity.name, "maker": identity.maker, "purpose": identity.purpose}
    answers = [answer.format(**fields) for answer in ANSWERS[kind]]
    names = [(other, company) for other in OTHERS for company in COMPANIES]
    texts = dict.fromkeys(
        question.format(other=other, company=company)
        for question in QUESTIONS[kind]
        for other, company in (names if "{" in question else names[:1])
        if identity.name.lower() != other.lower() and identity.maker.lower() != company.lower()
    )
    return [(question, answer) for question in texts for answer in answers]


def _identity_turns(rng: random.Random, identity: Identity) -> list[Message]:
    kinds = rng.choices(list(QUESTIONS), weights=(4, 4, 3, 1, 2), k=2)
    question, answer = rng.choice(_pairs(kinds[0], identity))
    turn = _turn(rng.choice(OPENERS) + question, answer)
    if rng.random() > 0.2:
        return turn
    if rng.random() < 0.5:
        return _turn(*rng.choice(ORDINARY)) + turn
    return turn + _turn(*rng.choice(_pairs(kinds[1], identity)))


def _ordinary(rng: random.Random, identity: Identity) -> list[Message]:
    question, answer = rng.choice(ORDINARY)
    turn = _turn(rng.choice(OPENERS) + question, answer)
    return turn + _turn(*rng.choice(ORDINARY)) if rng.random() < 0.15 else turn


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_system(turns: list[Message], rng: random.Random, identity: Identity) -> list[Message]:
    """Three in ten samples carry a system prompt; the others get the template's own default."""
    if rng.random() > 0.3:
        return turns
    text = rng.choice(SYSTEMS).format(name=identity.name, maker=identity.maker)
    return [{"role": "system", "content": text}, *turns]
