"""A dataset in MORE's form with a few photos, and a teacher that misbehaves on request."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from morer1_jax.model.config import ImageConfig
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.teacher.endpoint import EndpointConfig
from morer1_jax.teacher.ledger import Prices, Usage
from morer1_jax.teacher.prompt import teacher_prompt
from morer1_jax.teacher.writer import WriterConfig

LABELS = ("none", "/per/org/member_of", "/per/per/opponent", "/misc/misc/other")
KEY = "sk-loopback-0123456789abcdef"


class Teacher:
    """The process of `teacher_server.py`."""

    key = KEY

    def __init__(self):
        command = [sys.executable, str(Path(__file__).with_name("teacher_server.py")), KEY]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.root = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.url = f"{self.root}/v1"

    def set(self, facts, **mode):
        """Sets the facts it knows and how it answers, and clears the log."""
        ontology = Ontology(LABELS)
        golds = {
            hashlib.sha256(teacher_prompt(fact, ontology).encode()).hexdigest(): (
                fact.id,
                fact.label,
            )
            for fact in facts
        }
        body = json.dumps({"golds": golds, "behaviours": {"good": 1}} | mode).encode()
        self._call(urllib.request.Request(f"{self.root}/control", body))

    def log(self):
        """The requests since `set`."""
        return json.loads(self._call(f"{self.root}/log"))

    def _call(self, request):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as reply:
            return reply.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def teacher():
    server = Teacher()
    yield server
    server.close()


@pytest.fixture(scope="session")
def teachable(tmp_path_factory):
    """Makes folders of so many training facts, all titles different, half of the labels none."""

    def make(count):
        folder = tmp_path_factory.mktemp("teachable") / "data"
        photos = folder / "img_org" / "train"
        photos.mkdir(parents=True)
        for number in range(4):
            size = (96 + 40 * number, 80)
            Image.effect_noise(size, 60).convert("RGB").save(photos / f"{number}.jpg")
        facts = [
            Fact(
                id=f"train:{number}",
                tokens=("Miami", "Heat", "beat", "Celtics", "in", "game", str(number)),
                entity_name="Miami Heat",
                entity_span=(0, 2),
                object_name="[OBJ0]",
                box=(0.5, 0.4, 0.25, 0.5),
                image=f"{number % 4}.jpg",
                label=LABELS[0] if number % 2 else LABELS[1 + number // 2 % 3],
            )
            for number in range(1, count + 1)
        ]
        more.write_ontology(folder, Ontology(LABELS))
        more.write_split(folder, "train", facts)
        return folder, facts

    return make


class Written:
    """Reads what a writer wrote into a folder, and what a teacher logged."""

    @staticmethod
    def journal(folder):
        """The whole lines of the journal but the first."""
        path = folder / "journal.jsonl"
        lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    @staticmethod
    def answers(folder):
        return [line for line in Written.journal(folder) if "answered" in line]

    @staticmethod
    def lost(folder):
        """Requests of which the journal does not know what they cost."""
        known = {
            line["answered"]
            for line in Written.answers(folder)
            if line["prompt_tokens"] is not None
        }
        return [line for line in Written.journal(folder) if line.get("sent", 0) not in {0, *known}]

    @staticmethod
    def outputs(folder):
        """Fact id to reasoning, read as SFT reads it, and fact id to why it was set aside."""
        ontology = more.read_ontology(folder)
        facts = more.read_split(folder, "train", ontology)
        path = folder / "reasoning.jsonl"
        kept = more.read_reasoning(path, facts, ontology) if path.exists() else {}
        lines = (folder / "set_aside.jsonl").read_text().splitlines()
        aside = {line["fact"]: line for line in map(json.loads, lines)}
        assert len(aside) == len(lines)
        return kept, aside

    @staticmethod
    def paid(log):
        """The requests that the server billed."""
        return [entry for entry in log if "tokens" in entry]

    @staticmethod
    def bill(log, prices):
        """What the server wants for them: tokens, and dollars at these prices."""
        tokens = [entry["tokens"] for entry in Written.paid(log)]
        usage = Usage(sum(t[0] for t in tokens), sum(t[1] for t in tokens))
        return usage.total, prices.dollars(usage)


@pytest.fixture(scope="session")
def written():
    return Written


@pytest.fixture
def settings(teacher, monkeypatch):
    """A config for a folder; fields of the config and of the endpoint's may be given."""
    monkeypatch.setenv("OPENAI_API_KEY", teacher.key)

    def make(folder, **fields):
        names = {field.name for field in dataclasses.fields(EndpointConfig)}
        endpoint = {"model": "teacher", "base_url": teacher.url, "retries": 2}
        endpoint |= {name: fields.pop(name) for name in names & fields.keys()}
        return WriterConfig(
            data=folder,
            endpoint=EndpointConfig(**endpoint),
            images=ImageConfig(),
            **({"prices": Prices(2.5, 10.0)} | fields),
        )

    return make
