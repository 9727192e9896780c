"""The page's templates, which escape every text that is not markup already.

The page loads nothing. Its content security policy forbids scripts and any source but the page
itself, so that even a mistake in escaping a title or a completion could not run or fetch anything.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=PackageLoader("morer1_jax.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> Markup:
    """Returns the markup of a file in `templates/`, filled with values."""
    return Markup(_TEMPLATES.get_template(template).render(values))
