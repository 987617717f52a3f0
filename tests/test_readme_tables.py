"""Tables of the READMEs are complete: policies, keys of configs, options of models."""

from __future__ import annotations

import inspect
import re
import typing
import warnings
from collections.abc import Callable

import pytest
from pages import text_of
from pydantic import BaseModel

from neustream import POLICIES
from neustream.config import (
    LlmExperiment,
    ModelsConfig,
    StagesExperiment,
    StepsWorkload,
    TokensWorkload,
)
from neustream.config.fields import Between
from neustream.config.schema import KINDS, LlmModel, StagesModel


def first_cells(text: str) -> list[str]:
    """The names in backticks in the first cells of a text's tables."""
    return [
        name for cell in re.findall(r"^\|([^|]*)\|", text, re.MULTILINE) for name in re.findall(r"`([\w.]+)`", cell)
    ]


def test_the_table_of_policies_is_complete():
    assert sorted(first_cells(text_of("neustream/core/policies/README.md"))) == sorted(POLICIES)


def sections() -> dict[str, list[type[BaseModel]]]:
    """The sections of configs of all kinds, by the headings that they have in configs/README.md."""
    found: dict[str, list[type[BaseModel]]] = {}

    def add(heading: str, model: type[BaseModel], before: str = "") -> None:
        if model in found.setdefault(heading, []):
            return
        found[heading].append(model)
        for key, hint in typing.get_type_hints(model).items():
            for part, ending in parts_of(hint):
                name = f"{before}{key}{ending}"
                add(name, part, "" if name == "models.NAME" else f"{name}.")  # sections of models are described once

    for kind in KINDS:
        add("Top of a file with one model", kind)
    add("Top of a file with several models", ModelsConfig)
    return found


def parts_of(hint: object, ending: str = "") -> list[tuple[type[BaseModel], str]]:
    """The sections in a type, with what their heading ends with; drawn numbers have no heading of their own."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [(hint, ending)] if hint.__module__ != Between.__module__ else []
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return parts_of(arguments[1], ending + ".NAME")
    return [part for one in arguments for part in parts_of(one, ending + "[]" if origin is list else ending)]


OF_ONE_KIND = {
    StagesExperiment: "(stages)",
    StagesModel: "(stages)",
    LlmModel: "(llm)",
    StepsWorkload: "(stages)",
    LlmExperiment: "(llm)",
    TokensWorkload: "(llm)",
}
"""What the row of a key says that only one kind of config has."""


def number(value: float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        value = int(value)
    if isinstance(value, int):
        power = value >= 2**20 and value & (value - 1) == 0
        return f"2^{value.bit_length() - 1}" if power else f"{value:,}"
    return re.sub(r"e([+-])0?", lambda sign: "e" + sign[1].strip("+"), f"{value:g}")


def section_of(heading: str) -> str:
    page = text_of("configs/README.md")
    (section,) = re.findall(rf"^### `?{re.escape(heading)}`?\n(.*?)(?=^#|\Z)", page, re.DOTALL | re.MULTILINE)
    return section


def said_of(heading: str) -> dict[str, tuple[str, str]]:
    """Key -> default and what is allowed, as a section's table in configs/README.md has them."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*?) ?\| ([^|]*) \|", section_of(heading), re.MULTILINE)
    assert len(rows) == len({key for key, _, _ in rows})
    return {key: (default, allowed) for key, default, allowed in rows}


@pytest.mark.parametrize("heading", sections())
def test_the_keys_of_configs_are_all_there_with_their_defaults_and_limits(heading):
    models, said = sections()[heading], said_of(heading)
    fields = {key: (model, field) for model in models for key, field in model.model_fields.items()}
    assert sorted(said) == sorted(fields)
    for key, (model, field) in fields.items():
        if not all(key in each.model_fields for each in models):
            row = re.search(rf"^\| `{key}` .*$", section_of(heading), re.MULTILINE)[0]
            assert OF_ONE_KIND[model] in row
        properties = model.model_json_schema()["properties"]
        default, allowed = said[key]
        if field.is_required():
            assert default == "required"
        elif field.default is None or isinstance(field.default, bool):
            assert default == {None: "none", True: "true", False: "false"}[field.default]
        elif isinstance(field.default, int | float):
            assert default == number(field.default)
        elif isinstance(field.default, str):
            assert default == (f"`{field.default}`" if field.default else '""')
        for part in (properties[key], *properties[key].get("anyOf", [])):
            for limit in ("minimum", "maximum", "exclusiveMaximum"):
                assert limit not in part or number(part[limit]) in allowed.split(), key


def test_numbers_are_written_as_people_do():
    assert [number(n) for n in (1, 0.001, 1e-6, 1e9, 1e13, 10**7, 2**20, 2**32, 5.0)] == [
        "1", "0.001", "1e-6", "1e9", "1e13", "10,000,000", "2^20", "2^32", "5",
    ]  # fmt: skip


def options_of_backends() -> dict[str, tuple[list[str], list[str]]]:
    """By page, the options that need a row in one of its tables, and the arguments of `submit`."""
    from neustream.backends.diffusers import PipelineMount, from_config
    from neustream.backends.transformers import TextMount
    from neustream.backends.transformers import from_config as of_texts

    def keywords(function: Callable[..., object]) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    images = [*keywords(PipelineMount), *from_config.Options.model_fields]
    texts = ["tokenizer", "prompt", *keywords(TextMount), *of_texts.Options.model_fields]
    return {
        "neustream/backends/diffusers/README.md": (images, keywords(PipelineMount.request)),
        "neustream/backends/transformers/README.md": (texts, keywords(TextMount.request)),
    }


def test_all_options_of_served_models_are_named():
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pages = options_of_backends()
    for page, (options, of_submit) in pages.items():
        assert set(options) - set(first_cells(text_of(page))) == set(), page
        assert set(of_submit) - set(re.findall(r"`([a-z_]+)`", text_of(page))) == set(), page


def test_all_settings_inside_vllm_are_named():
    from neustream.backends.vllm.settings import DefaultSLO, Settings
    from neustream.backends.vllm.slo_args import KEYS

    page = text_of("neustream/backends/vllm/README.md")
    assert set(Settings.model_fields) <= set(first_cells(page))
    assert {*DefaultSLO.model_fields, *KEYS, "config"} <= set(re.findall(r"`([a-z_]+)`", page))
