"""The model's prompt: two images, title, entity, labels, types and the form of the answer.

The same words serve SFT, sampling, rating, evaluation and prediction. The conversation follows the
Qwen2.5-VL chat format, in which each image stands as one `<|image_pad|>` between vision marks until
its number of vision tokens is known.
"""

from __future__ import annotations

import re

from morer1_jax.errors import DataError
from morer1_jax.model.special import IMAGE_PAD
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology

_IMAGE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>")

_CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{images}{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
# Text that differs between facts comes last, next to the answer.
_QUESTION = """\
{pictures}How is the object related to the entity in the title?
Labels:
{labels}
Types: {types}
Reason in six steps, a line each, then give one label:
<think>
Step 1: ...
Step 6: ...
</think>
<answer>label</answer>
Title: {title}
Entity: {entity}"""
_PICTURES = "A news photo, and an object cut out of it.\n"


def question(
    fact: Fact, ontology: Ontology, *, show_photo: bool = True, show_title: bool = True
) -> str:
    """Returns the question about one fact, without the conversation around it.

    Args and errors are those of `student_prompt`.
    """
    for name, text in (("title", fact.title), ("entity", fact.entity_text)):
        if token := SPECIAL_TOKEN.search(text):
            raise DataError(
                f"{fact.id}: the {name} holds {token.group()!r}, which is a special token of the "
                "model; remove it from the text"
            )
    return _QUESTION.format(
        pictures=_PICTURES if show_photo else "",
        title=fact.title if show_title else "hidden",
        entity=fact.entity_text,
        labels="\n".join(ontology.labels),
        types=", ".join(ontology.types),
    )


def student_prompt(
    fact: Fact, ontology: Ontology, *, show_photo: bool = True, show_title: bool = True
) -> str:
    """Returns the conversation up to where the assistant speaks.

    Args:
        fact: its label is not read.
        ontology: the labels and types that the prompt lists.
        show_photo: False leaves photo and crop out (a blind baseline).
        show_title: False leaves the title's words out; the entity stays (a blind baseline).

    Returns:
        Text with one `<|image_pad|>` for the photo and one for the crop, in this order, or none.

    Raises:
        DataError: the title or the entity holds a special token, which the tokenizer would take for
            a turn or an image of its own.
    """
    text = question(fact, ontology, show_photo=show_photo, show_title=show_title)
    return conversation(text, 2 if show_photo else 0)


def conversation(question: str, images: int) -> str:
    """Returns the conversation with a question after its images, up to the answer."""
    return _CONVERSATION.format(images=_IMAGE * images, question=question)


def direct_answer(label: str) -> str:
    """Returns a target without reasoning."""
    return f"<answer>{label}</answer>"
