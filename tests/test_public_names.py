"""The names of the package: complete, found where they are said to be, each with a docstring of a sentence."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import textwrap

import pytest

import neustream

HOME_OF = {name: module for module, names in neustream._HOMES.items() for name in names}


def test_the_names_and_their_homes_are_the_same():
    assert sorted(HOME_OF) == sorted(neustream.__all__)
    assert sum(len(names) for names in neustream._HOMES.values()) == len(HOME_OF)
    assert len(set(neustream.__all__)) == len(neustream.__all__)


def own_text(name: str) -> str:
    """A name's own docstring; of a constant, the text behind it in its file."""
    value = getattr(neustream, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return inspect.cleandoc(vars(value).get("__doc__") or "" if inspect.isclass(value) else value.__doc__ or "")
    body = ast.parse(inspect.getsource(importlib.import_module(HOME_OF[name]))).body
    for before, after in itertools.pairwise(body):
        targets = before.targets if isinstance(before, ast.Assign) else [getattr(before, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return str(after.value.value)
    return ""


@pytest.mark.parametrize("name", neustream.__all__)
def test_each_has_a_docstring_of_a_sentence(name):
    first = own_text(name).split("\n\n")[0]
    assert not first.startswith(f"{name}("), "what dataclasses write themselves"
    assert len(first.split()) >= 3 and first.rstrip()[-1] in ".:", first


def code_of_a_call(value: object) -> str:
    """The code that runs when a class or function is called; not what dataclasses write themselves."""
    if inspect.isfunction(value):
        return inspect.getsource(value)
    body = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0].body
    makers = [node for node in body if getattr(node, "name", "") in ("__init__", "__post_init__")]
    return "\n".join(map(ast.unparse, makers))


CALLED = [name for name in neustream.__all__ if callable(getattr(neustream, name))]


@pytest.mark.parametrize("name", CALLED)
def test_errors_of_a_call_are_told(name):
    source = code_of_a_call(getattr(neustream, name))
    assert "raise " not in source or "Error" in own_text(name)


@pytest.mark.parametrize("name", neustream.__all__)
def test_each_is_what_its_home_has(name):
    assert getattr(neustream, name) is getattr(importlib.import_module(HOME_OF[name]), name)
