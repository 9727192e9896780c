"""One fact: an object in a photo, an entity in the title, and the relation between them."""

import unicodedata
from dataclasses import dataclass


def composed(text: str) -> str:
    """Returns text in Unicode's composed form (NFC), the form in which text is compared.

    The model's tokenizers compose what they read, and macOS types and keeps decomposed letters.
    """
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Fact:
    """One labelled pair of a visual object and a textual entity.

    Attributes:
        id: split and line number in the split's file, counted from 1: `train:12`.
        tokens: the words of the title.
        entity_name: the entity as the dataset names it.  Usually `entity_text`, but released data
            may differ from the title in case or tokenisation, so the two are kept apart.
        entity_span: first word of the entity and the word after its last, indices in `tokens`.
        object_name: the dataset's name of the object, unique within its photo: `[OBJ0]`.
        box: the object's box as (x centre, y centre, width, height), fractions of the photo.
        image: file name of the photo within its split's folder, as the folder has it; all other
            text is composed.
        label: one of the ontology's labels.
    """

    id: str
    tokens: tuple[str, ...]
    entity_name: str
    entity_span: tuple[int, int]
    object_name: str
    box: tuple[float, float, float, float]
    image: str
    label: str

    @property
    def split(self) -> str:
        """The fact's split: `train`, `valid` or `test`."""
        return self.id.rpartition(":")[0]

    @property
    def photo(self) -> str:
        """Split and file name, which together name one photo: `train/1.jpg`."""
        return f"{self.split}/{self.image}"

    @property
    def title(self) -> str:
        """The title's words joined by single spaces."""
        return " ".join(self.tokens)

    @property
    def entity_text(self) -> str:
        """The title's words under the entity's span, joined by single spaces."""
        start, end = self.entity_span
        return " ".join(self.tokens[start:end])
