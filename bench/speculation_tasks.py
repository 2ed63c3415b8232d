"""What bench/speculation.py lets a model write: prompts made here, and how they are answered."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT = """The lighthouse at Carrow Point was built in 1874 by the engineer Thomas Brand. It stands \
on a low cliff above the harbour and is painted in broad bands of red and white. For more than \
ninety years a keeper lived in the small stone house beside it, trimmed the lamp every evening, \
and wrote the weather into a thick grey book. In 1968 the lamp was replaced by an electric one, \
and the last keeper, Ellen Marsh, moved to the village. Today the house is a museum that opens \
from April to October, and visitors may climb the one hundred and twelve steps to the gallery."""

MISSPELT = TEXT.replace("built", "bilt").replace("evening", "evning").replace("stone", "ston")

CODE = """def read_table(path, separator=","):
    rows = []
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            rows.append(line.split(separator))
    return rows


def column(rows, index):
    values = []
    for row in rows:
        if index < len(row):
            values.append(float(row[index]))
    return values


def mean(values):
    if not values:
        return 0.0
    return sum(values) / len(values)
"""

PERSON: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 20},
        "last_name": {"type": "string", "maxLength": 20},
        "date_of_birth": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
        "occupation": {"type": "string", "maxLength": 30},
        "is_married": {"type": "boolean"},
        "number_of_children": {"type": "integer", "minimum": 0, "maximum": 9},
        "place_of_residence": {"enum": ["village", "small town", "city", "capital"]},
    },
    "additionalProperties": False,
}
PERSON = {**PERSON, "required": [*PERSON["properties"]]}

ANIMALS = (
    "a fox who learns to swim", "an owl who is afraid of the dark", "a hedgehog who finds a key",
    "a crow who collects bells", "a mole who wants to see the sea", "a hare who is never on time",
    "a badger who opens an inn", "a goose who flies alone", "a cat who guards a library",
    "a bear who cannot sleep", "a mouse who builds a boat", "a wolf who lost his pack",
    "a deer who speaks with stones", "a frog who rings the bell", "an otter who draws maps",
    "a snail who carries letters",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Something to write: one prompt a sequence, all side by side."""

    group: str
    name: str
    prompts: tuple[str, ...]
    options: Mapping[str, Any]
    """Of SamplingParams."""
    schema: Mapping[str, Any] | None = None


REPEATS, FREE, STRUCTURED, BATCH = (
    "Text that repeats its prompt", "Text that does not", "JSON of a schema", "Side by side"
)  # fmt: skip

GREEDY: Mapping[str, Any] = {"temperature": 0.0}
VARIED: Mapping[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.2}
SAMPLED: Mapping[str, Any] = {"temperature": 0.8, "seed": 1}


def story(about: str) -> str:
    return f"Tell me a story about {about}."


def describe() -> str:
    fields = ", ".join(name.replace("_", " ") for name in PERSON["properties"])
    return f"Invent a person. Give {fields} as JSON."


def tasks() -> Iterator[Task]:
    repeat = (f"Repeat this text word for word:\n\n{TEXT}",)
    edit = (
        "Fix the spelling mistakes in this text and write out the corrected text:\n\n" + MISSPELT,
    )
    code = (f"Repeat this code:\n\n```python\n{CODE}```",)
    quote = (f"Quote the sentences of this text that are about the keeper:\n\n{TEXT}",)
    yield Task(REPEATS, "repeat a text", repeat, {**GREEDY, "max_tokens": 160})
    yield Task(REPEATS, "repeat a text, temperature 0.8", repeat, {**SAMPLED, "max_tokens": 160})
    yield Task(REPEATS, "correct a text", edit, {**GREEDY, "max_tokens": 160})
    yield Task(REPEATS, "repeat code", code, {**GREEDY, "max_tokens": 200})
    yield Task(REPEATS, "quote from a text", quote, {**GREEDY, "max_tokens": 160})
    alone = (story(ANIMALS[0]),)
    yield Task(FREE, "story", alone, {**GREEDY, "max_tokens": 200})
    yield Task(FREE, "story, repetition penalty 1.2", alone, {**VARIED, "max_tokens": 200})
    yield Task(FREE, "story, temperature 0.8", alone, {**SAMPLED, "max_tokens": 200})
    yield Task(
        STRUCTURED, "a person, temperature 0.8", (describe(),), {**SAMPLED, "max_tokens": 160},
        PERSON,
    )  # fmt: skip
    for n in (8, 16):
        several = tuple(map(story, ANIMALS[:n]))
        options = {**SAMPLED, "max_tokens": 64}
        yield Task(BATCH, f"{n} stories, temperature 0.8", several, options)
    texts = tuple(f"Repeat this text word for word:\n\n{TEXT[i:]}" for i in sentences(TEXT, 4))
    yield Task(BATCH, "8 texts repeated", texts * 2, {**GREEDY, "max_tokens": 64})


def sentences(text: str, n: int) -> Sequence[int]:
    """Where the first `n` of them begin."""
    starts = [0]
    while len(starts) < n:
        starts.append(text.index(". ", starts[-1]) + 2)
    return starts
