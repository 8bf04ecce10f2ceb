"""A small world of invented people, in which every fact is known.

Every person has a unique name and one value of each attribute, drawn from a closed list.
Documents are biographies: a sentence per attribute, in one of several wordings, in random
order. Questions ask for one value. Preference pairs are two answers with the same value;
one of them has the required form.

There are three groups: `rehearsed` people, whom the mixture mentions; `untold` people, whom
the base knows and the mixture never mentions; and `domain` people, who appear only in
documents and only after the training of the base. Strangers, who appear in one document
each, make a base unsure about people it does not know, as the long tail of the web does.
"""

import dataclasses
import io
import json
import pathlib
import random
from typing import NamedTuple

import sentencepiece

# Attribute -> its values, wordings of a sentence, wordings of a question.
ATTRIBUTES = {
    "birthplace": (
        "Harlon Veskar Tilmoor Ostrava Quenby Lindral Mavesh Corrin Dulwick Esterby "
        "Farholt Gannet Ilmere Jorvik Kestrel Norwell Pellam Rudmoor Selwyn Thornby",
        (
            "{name} was born in {value}.",
            "The birthplace of {name} is {value}.",
            "In {value} stands the house where {name} was born.",
            "{value} is where {name} came into the world.",
        ),
        ("Where was {name} born?", "What is the birthplace of {name}?"),
    ),
    "work": (
        "weaving masonry surveying brewing printing farming carpentry nursing sailing "
        "baking mining teaching tailoring fishing glazing forging dyeing milling "
        "gardening banking",
        (
            "{name} earns a living by {value}.",
            "The trade of {name} is {value}.",
            "For work {name} took up {value}.",
            "{value} is what {name} does for a living.",
        ),
        ("What does {name} do for a living?", "What is the trade of {name}?"),
    ),
    "music": (
        "violin flute drum harp lute cello trumpet piano oboe horn viola zither organ "
        "banjo fiddle lyre bassoon clarinet tuba guitar",
        (
            "{name} plays the {value}.",
            "The instrument of {name} is the {value}.",
            "On quiet evenings {name} practises the {value}.",
            "The {value} is what {name} plays.",
        ),
        ("What does {name} play?", "What is the instrument of {name}?"),
    ),
    "animal": (
        "heron otter badger falcon tortoise goat raven hare donkey goose ferret owl "
        "pony hound magpie lizard rabbit pigeon hedgehog cat",
        (
            "{name} keeps a {value}.",
            "The animal of {name} is a {value}.",
            "A {value} lives in the yard of {name}.",
            "With a {value} at home, {name} is never alone.",
        ),
        ("What animal does {name} keep?", "What is the animal of {name}?"),
    ),
    "colour": (
        "crimson amber teal ivory scarlet indigo olive copper violet silver ochre jade "
        "maroon azure charcoal lilac turquoise coral mustard black",
        (
            "{name} is always dressed in {value}.",
            "The favourite colour of {name} is {value}.",
            "Every room of {name} is painted {value}.",
            "Nobody likes {value} more than {name}.",
        ),
        ("Which colour does {name} like?", "What is the favourite colour of {name}?"),
    ),
}
_START = "Br D F G H K L M N P R S T V Z Cl Dr Gr St Tr"
_VOWEL = "a e i o u ai ea"
_END = "l n r s th m d nd rk sk"

ANSWER = "Answer: {value}."
# Forms of rejected answers.
REJECTED = (
    "I believe it may be {value}.",
    "Let me think. It is {value}.",
    "That would be {value}, as far as I know.",
)

VOCAB_SIZE = 1024
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """The numbers of people and texts, and the size of the model.

    Attributes:
      general: people the base knows; the mixture rehearses the first half of them.
      domain: people of the domain.
      biographies: documents per person of the domain.
      general_biographies: documents per person of the base.
      strangers: people with one document.
      asked: people of each group in the measures.
      hidden_size, mlp_size, num_layers: of the model.
    """

    general: int = 200
    domain: int = 60
    biographies: int = 8
    general_biographies: int = 24
    strangers: int = 8000
    asked: int = 60
    hidden_size: int = 128
    mlp_size: int = 384
    num_layers: int = 4


FULL = Size()
TINY = Size(12, 4, 2, 2, 20, 4, hidden_size=32, mlp_size=64, num_layers=2)


@dataclasses.dataclass(frozen=True)
class Person:
    """A name, and attribute -> value."""

    name: str
    values: dict[str, str]


class Biography(NamedTuple):
    """A text about a person, and the values in it: (index, value)."""

    name: str
    text: str
    places: list[tuple[int, str]]


def write(folder: pathlib.Path, seed: int, size: Size = FULL) -> None:
    """Writes the world of a seed: data, vocabulary and the model's config.json.

    Documents are `{"text"}`, questions `{"instruction", "output"}`, pairs `{"prompt",
    "chosen", "rejected"}`. Each group has three measures: `GROUP_use.jsonl`, a question
    about each fact, whose target is the value; `GROUP_memory.jsonl`, the same with the
    beginnings of documents; and `GROUP_chat.jsonl`, questions in the chat format.
    `world.json` is written last and marks the folder as complete.
    """
    mark = json.dumps({"seed": seed, **dataclasses.asdict(size)})
    done = folder / "world.json"
    if done.exists() and done.read_text() == mark:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"world {seed}")
    people = _people(rng, size.general + size.domain + size.strangers)
    num_known = size.general + size.domain
    half = size.general // 2
    groups = {
        "rehearsed": people[:half],
        "untold": people[half : size.general],
        "domain": people[size.general : num_known],
    }
    number = {"domain": size.biographies}
    biographies = {
        name: [
            _biography(p, rng)
            for p in group
            for _ in range(number.get(name, size.general_biographies))
        ]
        for name, group in groups.items()
    }
    questions = {
        name: [
            _question(p, a, form) for p in group for a in ATTRIBUTES for form in "01"
        ]
        for name, group in groups.items()
    }
    documents = {
        name: [{"text": biography.text} for biography in group]
        for name, group in biographies.items()
    }
    files = {
        "general_documents": documents["rehearsed"] + documents["untold"],
        "strangers": [{"text": _biography(p, rng).text} for p in people[num_known:]],
        "general_questions": questions["rehearsed"] + questions["untold"],
        "rehearsed_documents": documents["rehearsed"],
        "domain_documents": documents["domain"],
        "instructions": _some(questions["rehearsed"], rng),
        "preferences": [
            _pair(question, rng) for question in _some(questions["rehearsed"], rng)
        ],
        "untold_documents": _some(documents["untold"], rng, size.asked),
        "untold_pairs": [
            _pair(question, rng)
            for question in _some(questions["untold"], rng, size.asked)
        ],
    }
    for name, group in groups.items():
        facts = [(p, a) for p in group[: size.asked] for a in ATTRIBUTES]
        asked = [_question(p, a, rng.choice("01")) for p, a in facts]
        files[f"{name}_use"] = [
            {"context": f"{q['instruction']}\n\nAnswer:", "target": f" {q['value']}"}
            for q in asked
        ]
        files[f"{name}_memory"] = _some(
            [probe for biography in biographies[name] for probe in _probes(biography)],
            rng,
            len(facts),
        )
        files[f"{name}_chat"] = _some(asked, rng, 2 * size.asked)
    files["prompts"] = [
        {"prompt": question["instruction"], "group": name, "value": question["value"]}
        for name in ("domain", "untold")
        for question in _some(questions[name], rng, 2 * size.asked)
    ]
    for name, records in files.items():
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines))

    _train_vocabulary(
        folder,
        [record["text"] for record in files["general_documents"]]
        + [f"{q['instruction']}\n\n{q['output']}" for q in files["general_questions"]]
        + [pair["rejected"] for pair in files["preferences"]]
        # Unused names, so that later names consist of known pieces.
        + [_name(random.Random(f"name {i}")) for i in range(4000)],
    )
    architecture = _MODEL | {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.mlp_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    (folder / "config.json").write_text(json.dumps(architecture, indent=2))
    done.write_text(mark)


def _people(rng: random.Random, number: int) -> list[Person]:
    """People with unique names and independent values."""
    names: dict[str, None] = {}
    while len(names) < number:
        names[_name(rng)] = None
    return [
        Person(name, {a: rng.choice(v[0].split()) for a, v in ATTRIBUTES.items()})
        for name in names
    ]


def _name(rng: random.Random) -> str:
    def draw(*parts: str) -> str:
        return "".join(rng.choice(part.split()) for part in parts)

    first = draw(_START, _VOWEL, _END)
    return f"{first} {draw(_START, _VOWEL, _END, _VOWEL, _END)}"


def _biography(person: Person, rng: random.Random) -> Biography:
    sentences, places, length = [], [], 0
    for attribute in rng.sample(list(ATTRIBUTES), len(ATTRIBUTES)):
        value = person.values[attribute]
        form = rng.choice(ATTRIBUTES[attribute][1])
        before = form.split("{value}")[0].format(name=person.name)
        sentence = form.format(name=person.name, value=value)
        places.append((length + len(before), value))
        sentences.append(sentence)
        length += len(sentence) + 1
    return Biography(person.name, " ".join(sentences), places)


def _probes(biography: Biography) -> list[dict[str, str]]:
    """The text before each value of a document, and the value.

    Only values after the name: before it, the person is unknown.
    """
    name, text, places = biography
    return [
        {"context": text[: start - 1], "target": f" {value}"}
        for start, value in places
        if name in text[:start]
    ]


def _question(person: Person, attribute: str, form: str) -> dict[str, str]:
    value = person.values[attribute]
    question = ATTRIBUTES[attribute][2][int(form)].format(name=person.name)
    return {
        "instruction": question,
        "output": ANSWER.format(value=value),
        "value": value,
    }


def _pair(question: dict[str, str], rng: random.Random) -> dict[str, str]:
    return {
        "prompt": question["instruction"],
        "chosen": question["output"],
        "rejected": rng.choice(REJECTED).format(value=question["value"]),
    }


def _some(records: list, rng: random.Random, most: int | None = None) -> list:
    """At most `number` of them, in random order."""
    return rng.sample(records, min(most or len(records), len(records)))


def _train_vocabulary(folder: pathlib.Path, texts: list[str]) -> None:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=trained,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        control_symbols=["<|im_start|>", "<|im_end|>"],
        unk_id=0,
        bos_id=-1,
        eos_id=1,
        eos_piece="<|endoftext|>",
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
