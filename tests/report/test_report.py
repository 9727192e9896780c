import base64
import dataclasses
import io
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from morer1_jax.report.report import write_report
from morer1_jax.run.batch_sampler import Answer
from morer1_jax.task import metrics, more
from morer1_jax.task.answer import format_answer
from morer1_jax.world.synthesise import WorldConfig, synthesise

SECTIONS = ("scores", "curves", "curriculum", "gallery")
STEPS = 30


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")


def fake_config(world):
    return {
        "seed": 7,
        "stages": "synthesise,sft,baselines,rate,grpo,evaluate",
        "world": dataclasses.asdict(world),
        "data": {"folder": None, "crop_margin": 0.1, "crop_least": 28},
        "model": {
            "text": {
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
            "vision": {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
            },
        },
        "runtime": {"param_dtype": "float32", "dtype": "float32"},
        "sft": {"steps": STEPS, "batch": 16},
        "grpo": {"steps": STEPS, "prompts": 16, "group": 8},
    }


def fake_metrics(steps, rng):
    """Curves as a run would log them, roughly."""

    def noise(scale):
        return rng.gauss(0.0, scale)

    def valid(stage, step, level):
        scores = {"accuracy": level + 8, "micro_f1": level, "macro_f1": level - 6, "unreadable": 1}
        return {
            "stage": stage,
            "step": step,
            "kind": "valid",
            **{f"validation/{k}": v for k, v in scores.items()},
        }

    for step in range(1, steps + 1):
        done = step / steps
        yield {
            "stage": "sft",
            "step": step,
            "kind": "train",
            "loss": 6 * math.exp(-9 * done) + 0.15 + abs(noise(0.03)),
            "entropy": 4 * math.exp(-7 * done) + 0.2 + noise(0.02),
            "grad_norm": 1 + abs(noise(0.4)),
            "target_tokens": 2900 + int(noise(60)),
            "step_time": 0.45 + abs(noise(0.02)),
        }
        if step % 5 == 0:
            yield valid("sft", step, 10 + 45 * done + noise(2))
            yield valid("baselines/photo_hidden", step, 8 + 12 * done)
            yield valid("control", step, 55 + noise(1))
    for step in range(1, steps + 1):
        done = step / steps
        right = 0.5 + 0.3 * done + noise(0.05)
        hard = 0.5 + 0.4 * min(done / 0.8, 1)
        hard = round(16 * hard) / 16
        yield {
            "stage": "grpo",
            "step": step,
            "kind": "train",
            "reward": 0.3 + right,
            "reward_std": 0.3 - 0.1 * done + abs(noise(0.02)),
            "frac_reward_zero_std": 0.3 + 0.2 * done + noise(0.06),
            "rewards/format/mean": min(0.97 + noise(0.02), 1),
            "rewards/effort/mean": 0.6 + 0.3 * done + noise(0.04),
            "rewards/accuracy/mean": right,
            "completions/mean_length": 80 + 12 * done + noise(2),
            "completions/min_length": 60 + int(noise(3)),
            "completions/max_length": 112 + int(noise(4)),
            "completions/clipped_ratio": 0.01,
            "entropy": 0.3 - 0.15 * done + noise(0.01),
            "clip_ratio/low_mean": 0.0,
            "clip_ratio/high_mean": 0.0,
            "clip_ratio/region_mean": 0.0,
            "sampling/sampling_logp_difference/mean": 1e-6,
            "sampling/sampling_logp_difference/max": 2e-5,
            "curriculum/easy_share": 1 - hard,
            "curriculum/hard_share": hard,
            "loss": noise(0.01),
            "grad_norm": None if step == 4 else 0.4 + abs(noise(0.1)),
            "step_time": 2.3 + abs(noise(0.1)),
        }
        if step % 5 == 0:
            yield valid("grpo", step, 55 + 18 * done + noise(1))


def fake_answer(fact, ontology, texts, share, rng):
    """A completion whose label is right with probability `share`, and sometimes unreadable."""
    label = fact.label if rng.random() < share else rng.choice(ontology.labels)
    text = re.sub(r"<answer>.*</answer>", f"<answer>{label}</answer>", rng.choice(texts))
    if rng.random() < 0.04:
        return Answer(fact.id, None, text[: len(text) // 2], False, 90)
    return Answer(fact.id, label, text + "<|im_end|>", True, 230)


def make_fake(workdir, *, test=48, steps=STEPS, seed=0):
    """A whole workdir of a run that never was."""
    rng = random.Random(seed)
    world = WorldConfig(train=24, valid=2, test=test, cast=4, written=1.0, noise=4.0)
    synthesise(workdir / "data", world, seed)
    (workdir / "config.json").write_text(json.dumps(fake_config(world)))
    write_lines(workdir / "metrics.jsonl", fake_metrics(steps, rng))
    ontology = more.read_ontology(workdir / "data")
    train, facts = (more.read_split(workdir / "data", s, ontology) for s in ("train", "test"))
    written = workdir / "data" / "reasoning.jsonl"
    texts = list(more.read_reasoning(written, train, ontology).values())
    shares = {"majority": 0.05, "photo_hidden": 0.3, "title_hidden": 0.2, "sft": 0.55}
    for name, share in (shares | {"control": 0.58, "no_mixing": 0.7, "grpo": 0.75}).items():
        answers = [fake_answer(fact, ontology, texts, share, rng) for fact in facts]
        write_answers(workdir, name, answers)
        scores = metrics.score(facts, [a.label for a in answers], ontology)
        (workdir / "eval" / f"{name}.json").write_text(json.dumps(scores))
    rates = [rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in train]
    write_lines(
        workdir / "rate" / "ratings.jsonl",
        [
            {"fact": f.id, "pass_rate": r, "pool": "easy" if r >= 0.5 else "hard"}
            for f, r in zip(train, rates, strict=True)
        ],
    )
    for stage, seconds in (("sft", 192.4), ("rate", 48.0)):
        (workdir / stage).mkdir(exist_ok=True)
        marker = {"stage": stage, "config": "", "results": {"seconds": seconds}}
        (workdir / stage / "DONE.json").write_text(json.dumps(marker))
    return workdir


def write_answers(workdir, name, answers):
    write_lines(workdir / "eval" / f"{name}.answers.jsonl", map(dataclasses.asdict, answers))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_fake(tmp_path_factory.mktemp("runs") / "fake")


@pytest.fixture(scope="module")
def html(workdir):
    return write_report(workdir, workdir / "data", gallery=8).read_text("utf-8")


def copy(workdir, to, *names):
    """A workdir with only some of another's files; `data` stays where it is."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes((workdir / name).read_bytes())
    return to


class Page(HTMLParser):
    """Elements with their attributes, and each section's text; fails if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.section = [], [], {"": ""}, ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.elements.append((name, attributes))
        if name not in ("img", "input", "meta"):
            self.open.append(name)
        if name == "section":
            self.section = attributes["id"]
            self.texts[self.section] = ""

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts[self.section] += data

    def all(self, name, class_=""):
        wanted = set(class_.split())
        return [a for n, a in self.elements if n == name and wanted <= set(_classes(a))]


def _classes(attributes):
    return attributes.get("class", "").split()


def test_a_whole_workdir_shows_every_section(html):
    page = Page(html)
    assert set(page.texts) == {"", *SECTIONS}
    remarks = re.findall(r'class="remark">(.*?)<', html)
    assert all(
        re.match(r"Zero throughout|Not logged: KL|Left out, without test facts", text)
        for text in remarks
    )
    for text in ("4 layers, width 128 / 384", "sft (3 min 12 s), baselines, rate (48 s)"):
        assert text in page.texts[""]
    scores = page.texts["scores"]
    names = ["Majority label", "Title hidden", "Photo hidden", "SFT", "SFT for longer"]
    places = [scores.index(name) for name in [*names, "GRPO without mixing"]]
    assert places == sorted(places)
    for text in ("Reward", "Completion length", "Photo hidden", "Not logged: KL"):
        assert text in page.texts["curves"]
    assert "24 facts" in page.texts["curriculum"]
    assert "50% of the first batch" in page.texts["curriculum"]


def test_the_tables_show_the_score_files(workdir, html):
    scores = json.loads((workdir / "eval" / "grpo.json").read_text())
    row = re.search(r'<tr><th scope="row">GRPO</th>(.*?)</tr>', html)[1]
    keys = ("accuracy", "micro_precision", "micro_recall", "micro_f1", "macro_f1", "unreadable")
    values = [scores[key] for key in keys] + [scores["lenient"]["micro_f1"]]
    assert re.findall(r"[\d.]+", re.sub("<.*?>", " ", row)) == [f"{v:.1f}" for v in values]
    gain = scores["micro_f1"] - json.loads((workdir / "eval" / "sft.json").read_text())["micro_f1"]
    assert f"GRPO, {gain:+.1f} over SFT" in html


def test_nothing_is_loaded_and_no_script_can_run(html):
    page = Page(html)
    for _, attributes in page.elements:
        for key in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:image/jpeg;base64,"))
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in page.elements}
    assert not re.search(r"url\(|@import|https?://", html)
    (policy,) = (a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_photos_are_small_jpegs_with_the_box_on_them(workdir, html):
    page = Page(html)
    sources = [image["src"].partition(",")[2] for image in page.all("img")]
    sizes = [Image.open(io.BytesIO(base64.b64decode(source))).size for source in sources]
    assert len(sizes) == 2 * 8
    assert max(max(size) for size in sizes) <= 360
    ontology = more.read_ontology(workdir / "data")
    boxes = {f.box for f in more.read_split(workdir / "data", "test", ontology)}
    for rect in page.all("rect", "inner"):
        x, y, w, h = (float(rect[key]) for key in ("x", "y", "width", "height"))
        centre = (x + w / 2, y + h / 2, w, h)
        assert any(all(map(math.isclose, centre, box)) for box in boxes)


def test_large_photos_are_made_small(tmp_path):
    workdir = make_fake(tmp_path / "run", test=2)
    for path in (workdir / "data" / "img_org" / "test").iterdir():
        Image.open(path).resize((1500, 1000)).save(path)
    html = write_report(workdir, workdir / "data").read_text("utf-8")
    sizes = {(int(a["width"]), int(a["height"])) for a in Page(html).all("img")}
    assert (360, 240) in sizes
    assert len(sizes) > 1
    assert all(max(size) == 200 for size in sizes - {(360, 240)})


def test_right_and_wrong_are_said_and_filtered(workdir, html):
    page = Page(html)
    facts = more.read_split(workdir / "data", "test", more.read_ontology(workdir / "data"))
    gold = {fact.id: fact.label for fact in facts}
    lines = (workdir / "eval" / "grpo.answers.jsonl").read_text("utf-8").splitlines()
    said = {answer["fact"]: answer["label"] for answer in map(json.loads, lines)}
    cards = re.findall(r'<article class="card (\w+)">\s*<header><b>(. \w+).*?<span>(.*?)<', html)
    assert len(cards) == 8
    for class_, verdict, fact in cards:
        right = said[fact] == gold[fact]
        assert (class_, verdict) == (("right", "✓ Right") if right else ("wrong", "✗ Wrong"))
    assert len(page.all("article", "right")) == len(page.all("article", "wrong")) == 4
    text = page.texts["gallery"]
    assert text.count("✓ Right") == 4 + 1
    assert text.count("✗ Wrong") == 4 + 1
    assert [a["id"] for a in page.all("input")] == ["all", "only-right", "only-wrong"]
    assert "#only-right:checked ~ .cards .wrong" in html


def test_what_data_says_is_escaped(tmp_path):
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>&\""
    workdir = make_fake(tmp_path / "<b>run", test=6)
    path = more.split_path(workdir / "data", "test")
    ontology = more.read_ontology(workdir / "data")
    facts = more.read_split(workdir / "data", "test", ontology)
    facts = [dataclasses.replace(f, tokens=(evil, *f.tokens[1:])) for f in facts]
    more.write_split(workdir / "data", "test", facts)
    assert "<script>" in path.read_text()
    steps = format_answer([f"{k} <script>1</script>" for k in range(6)], "none")
    texts = [steps, evil, evil * 200, "half a surrogate \ud800", "", "<answer>none</answer>"]
    answers = [Answer(f.id, "none", t, False, 0) for f, t in zip(facts, texts, strict=True)]
    path = workdir / "eval" / "grpo.answers.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(a)) + "\n" for a in answers))
    config = {"seed": evil, "stages": evil, "data": {"folder": evil}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "eval" / f"{evil.replace('/', '')}.json").write_text('{"micro_f1": 3}')
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": evil, "kind": "valid", "step": 1}) + "\n")
        record = {"stage": f"x/{evil}", "kind": "valid", "step": 1, "validation/micro_f1": 3}
        file.write(json.dumps(record) + "\n")
    html = write_report(workdir, workdir / "data", gallery=6).read_text("utf-8")
    page = Page(html)
    assert not page.all("script")
    assert len(page.all("img")) == 2 * 6
    assert not any(key.startswith("on") for _, a in page.elements for key in a)
    for section in ("", "scores", "curves", "gallery"):
        assert "alert(" in page.texts[section]
    assert page.texts["gallery"].count("0 <script>1</script>") == 1
    assert "said nothing" in page.texts["gallery"]


def test_the_same_files_and_seed_give_the_same_page(workdir, html):
    data = workdir / "data"
    assert write_report(workdir, data, gallery=8).read_text("utf-8") == html
    other = write_report(workdir, data, gallery=8, seed=1).read_text("utf-8")
    assert Page(other).texts["gallery"] != Page(html).texts["gallery"]
    assert Page(other).texts["scores"] == Page(html).texts["scores"]


def test_an_empty_workdir_gives_a_page_that_says_so(tmp_path):
    page = Page(write_report(tmp_path, tmp_path / "data").read_text("utf-8"))
    assert "config.json: expected a JSON object, found No such file" in page.texts[""]
    assert "No scores" in page.texts["scores"]
    assert "No SFT metrics" in page.texts["curves"]
    assert "No GRPO metrics" in page.texts["curves"]
    assert "No GRPO steps" in page.texts["curriculum"]
    assert "expected a rating" in page.texts["curriculum"]
    assert "No answers" in page.texts["gallery"]


def test_a_run_of_sft_alone(workdir, tmp_path):
    copy(workdir, tmp_path, "config.json", "eval/sft.json", "eval/sft.answers.jsonl")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    sft = "".join(line for line in lines if '"sft"' in line)
    (tmp_path / "metrics.jsonl").write_text(sft + '{"stage": "sft", "st')
    page = Page(write_report(tmp_path, workdir / "data", gallery=4).read_text("utf-8"))
    assert "SFT on the test facts" in page.texts["gallery"]
    assert len(page.all("article")) == 4
    assert "No GRPO metrics" in page.texts["curves"]
    assert "cannot be read: 1" in page.texts["curves"]
    assert "GRPO" not in page.texts["scores"]


def test_what_cannot_be_read_is_said_in_its_place(workdir, tmp_path):
    copy(workdir, tmp_path, "eval/grpo.json", "eval/grpo.answers.jsonl")
    (tmp_path / "eval" / "sft.json").write_text("{")
    (tmp_path / "rate").mkdir()
    (tmp_path / "rate" / "ratings.jsonl").write_text("[]\n")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": "x", "kind": "train"}\n')
    page = Page(write_report(tmp_path, tmp_path / "nowhere").read_text("utf-8"))
    assert "sft.json: expected a JSON object" in page.texts[""]
    assert "ratings.jsonl:1" in page.texts["curriculum"]
    assert "rel2id.json" in page.texts["gallery"]
    assert "cannot be read: 1" in page.texts["curves"]


def test_a_damaged_photo_is_said_on_its_card(tmp_path):
    workdir = make_fake(tmp_path / "run", test=3)
    for photo in (workdir / "data" / "img_org" / "test").iterdir():
        photo.write_bytes(photo.read_bytes()[:60])
    page = Page(write_report(workdir, workdir / "data").read_text("utf-8"))
    assert page.texts["gallery"].count("cannot be read") == len(page.all("article")) == 3
