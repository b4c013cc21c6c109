"""What a class does, by the file of its module, and whether what it calls is still what the file says.

Two methods do the same if they have the same code, and if the globals in it stand for the same: functions of the same
code whose globals stand for the same in turn, and otherwise the same objects. The files are asked, not what is in
memory by now, so that a patch of one model changes nothing about another. What is in memory is asked separately, of the
class that is to be fused alone.
"""

from __future__ import annotations

import builtins
import dis
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from inspect import CO_OPTIMIZED
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from .._extension import _C

# Whose functions are followed into their own modules: models, not the libraries that they are written in.
_FOREIGN = ("torch", "numpy")
_HAS_DOCSTRING = 0x4000000  # from Python 3.13 on; before, a function's first constant is its docstring or None
_LOAD_GLOBAL, _LOAD_CONST = dis.opmap["LOAD_GLOBAL"], dis.opmap["LOAD_CONST"]
_LOAD_SMALL_INT = dis.opmap.get("LOAD_SMALL_INT", -1)  # since Python 3.14
_IMPORT_NAME, _IMPORT_FROM, _STORE_NAME = (dis.opmap[name] for name in ("IMPORT_NAME", "IMPORT_FROM", "STORE_NAME"))
_FLAGS = 1 if sys.version_info >= (3, 11) else 0  # bits of LOAD_GLOBAL's argument that are not the name's
_ASSIGNED = ("", None)  # what a file gives a name without an import
_NOTHING: list[Any] = []
_MISSING = object()

is_compiling, unchanged = torch.compiler.is_compiling, _C.unchanged


# ---- Code ---------------------------------------------------------------------------------------------------------


@cache
def code_key(code: CodeType) -> tuple[Any, ...]:
    """What code does, to be compared, but for what its globals stand for."""
    constants = list(code.co_consts)
    documented = sys.version_info < (3, 13) or code.co_flags & _HAS_DOCSTRING
    if code.co_flags & CO_OPTIMIZED and documented and constants and isinstance(constants[0], str):
        constants[0] = None
    keys = [
        code_key(constant) if isinstance(constant, CodeType) else (type(constant), repr(constant))
        for constant in constants
    ]
    arguments = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & ~_HAS_DOCSTRING
    return code.co_code, tuple(keys), code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, arguments


@cache
def global_names(code: CodeType) -> tuple[str, ...]:
    """The globals that code and the functions in it read."""
    found = [code.co_names[argument >> _FLAGS] for step, argument in _steps(code) if step == _LOAD_GLOBAL]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += global_names(constant)
    return tuple(dict.fromkeys(found))


def _steps(code: CodeType) -> Iterator[tuple[int, int]]:
    """Operations of Python's bytecode and their arguments: what `dis` would give, in much less time."""
    extended = 0
    for step, argument in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        argument |= extended
        extended = argument << 8 if step == dis.EXTENDED_ARG else 0
        yield step, argument


@cache
def _codes_of(module: ModuleType) -> dict[str, list[CodeType]]:
    """Of a module's functions and classes by its file, by qualified name; more than one where the file has a choice.

    Python keeps what it compiled, so that this is no matter of compiling again.
    """
    found: dict[str, list[CodeType]] = {}
    if (code := _file_of(module)) is not None:
        _add_codes(code, "", found)
    return found


def _file_of(module: ModuleType) -> CodeType | None:
    try:
        loader: Any = module.__loader__
        code: CodeType | None = loader.get_code(module.__name__)
    except (AttributeError, ImportError, OSError, SyntaxError):
        return None
    return code


def _add_codes(code: CodeType, prefix: str, found: dict[str, list[CodeType]]) -> None:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.setdefault(prefix + constant.co_name, []).append(constant)
            if not constant.co_flags & CO_OPTIMIZED:  # a class, whose methods have names in it
                _add_codes(constant, f"{prefix}{constant.co_name}.", found)


@cache
def _imports_of(module: ModuleType) -> dict[str, list[tuple[str, str | None]]]:
    """By the names that a module's file gives them, from which modules it takes what; None is the module itself."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    code, package = _file_of(module), getattr(module, "__package__", None) or ""
    if code is None:
        return found
    names = code.co_names
    source, is_whole = "", False
    pending: tuple[str, str | None] | None = None  # what the next name is given to
    constants: list[Any] = [None, None]  # the last two: how far up a relative import begins, and what it takes
    for step, argument in _steps(code):
        if step == _LOAD_CONST:
            constants = [constants[1], code.co_consts[argument]]
        elif step == _LOAD_SMALL_INT:
            constants = [constants[1], argument]
        elif step == _IMPORT_NAME:
            level, taken = constants
            parent = package.rsplit(".", level - 1)[0] if level else ""
            source, is_whole = ".".join(part for part in (parent, names[argument]) if part), not taken
            pending = (source.partition(".")[0], None) if is_whole else None
        elif step == _IMPORT_FROM:
            pending = (source, None if is_whole else names[argument])
        elif step == _STORE_NAME:
            found.setdefault(names[argument], []).append(pending or _ASSIGNED)
            pending = None
    return {name: sources for name, sources in found.items() if set(sources) != {_ASSIGNED}}


# ---- What files say ------------------------------------------------------------------------------------------------


class _Definition(NamedTuple):
    """What a name in a module stands for by its file: code of a module, or an object."""

    module: ModuleType
    name: str
    codes: list[CodeType]
    value: Any = None


def _definition(module: ModuleType, name: str) -> _Definition:
    if codes := _codes_of(module).get(name):
        return _Definition(module, name, codes)
    for source, attribute in _imports_of(module).get(name, ()):
        value = _imported(source, attribute)
        if value is _MISSING:
            continue
        if attribute is not None and not _is_foreign(source):
            further = _definition(sys.modules[source], attribute)
            if further.codes and _is_function(further.codes):
                return further
        return _Definition(module, name, [], value)
    return _Definition(module, name, [], vars(module).get(name, getattr(builtins, name, _MISSING)))


def _imported(source: str, attribute: str | None) -> Any:
    module = sys.modules.get(source)
    if module is None:
        return _MISSING
    if attribute is None:
        return module
    found = getattr(module, attribute, _MISSING)
    return sys.modules.get(f"{source}.{attribute}", _MISSING) if found is _MISSING else found


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] in _FOREIGN


def _is_function(codes: list[CodeType]) -> bool:
    return all(code.co_flags & CO_OPTIMIZED for code in codes)


def mean_the_same(module: ModuleType, name: str, other: ModuleType, other_name: str) -> bool:
    """Whether names in two modules stand for the same, by the files of these."""
    return _same(_definition(module, name), _definition(other, other_name), set())


def _same(one: _Definition, other: _Definition, assumed: set[tuple[Any, ...]]) -> bool:
    if not one.codes or not other.codes:
        return not one.codes and not other.codes and _same_object(one, other)
    pair = *one[:2], *other[:2]
    if one[:2] == other[:2] or pair in assumed:
        return True
    assumed.add(pair)  # functions may call each other
    if [code_key(code) for code in one.codes] != [code_key(code) for code in other.codes] or not _same_form(one, other):
        return False
    names = dict.fromkeys(name for code in one.codes for name in global_names(code))
    return all(_same(_definition(one.module, name), _definition(other.module, name), assumed) for name in names)


def _same_object(one: _Definition, other: _Definition) -> bool:
    a, b = one.value, other.value
    if a is b:
        return True
    if isinstance(a, logging.Logger) and isinstance(b, logging.Logger):  # each module's own
        return a.name.endswith(one.module.__name__) and b.name.endswith(other.module.__name__)
    return type(a) is type(b) and isinstance(a, (bool, int, float, str, bytes)) and repr(a) == repr(b)


def _same_form(one: _Definition, other: _Definition) -> bool:
    """Whether two functions have the same defaults, or two classes the same bases, which their code does not say: so
    far as they are still in memory."""
    if not all(_is_as_filed(*definition[:3]) for definition in (one, other)):
        return True
    a, b = (_found(*definition[:2]) for definition in (one, other))
    if isinstance(a, type) or isinstance(b, type):
        return getattr(a, "__bases__", None) == getattr(b, "__bases__", None)
    a, b = undecorated(a), undecorated(b)
    assert a is not None and b is not None  # as what was looked for is a function
    return repr((a.__defaults__, a.__kwdefaults__)) == repr((b.__defaults__, b.__kwdefaults__))


# ---- What is in memory ---------------------------------------------------------------------------------------------


def _found(module: ModuleType, qualname: str) -> Any:
    owner, _, name = qualname.rpartition(".")
    where = vars(module) if not owner else getattr(_found(module, owner), "__dict__", {})
    return where.get(name)


def undecorated(function: Any) -> FunctionType | None:
    """A function without what transformers puts around it, for checkpoints, arguments that were renamed, tuples as
    results, experts, and kernels of its hub. What others put around it stays."""
    if isinstance(function, nn.Module) and type(function).__module__.partition(".")[0] == "kernels":
        closure: tuple[Any, ...] = getattr(type(function).forward, "__closure__", None) or ()
        function = closure[0].cell_contents if len(closure) == 1 and "forward" not in vars(function) else None
    while hasattr(function, "__wrapped__") and function.__code__.co_filename in _decorators():
        function = function.__wrapped__
    return function if isinstance(function, FunctionType) else None


def mentions(function: Any, name: str) -> bool:
    """Whether a function's code has a name in it: a global's, an attribute's, or a keyword that it passes."""
    plain = undecorated(function)
    if plain is None:
        return False
    constants = plain.__code__.co_consts
    return name in plain.__code__.co_names or any(
        constant == name or (isinstance(constant, tuple) and name in constant) for constant in constants
    )


@cache
def _decorators() -> frozenset[str]:
    """The files that have it."""
    names = ("modeling_layers", "utils.deprecation", "utils.generic", "integrations.moe")
    found = set()
    for name in names if "transformers" in sys.modules else ():
        with suppress(ImportError):  # older versions of transformers have no such experts
            found.add(importlib.import_module(f"transformers.{name}").__file__ or "")
    return frozenset(found)


def _is_as_filed(module: ModuleType, qualname: str, codes: list[CodeType]) -> bool:
    value = _found(module, qualname)
    if not _is_function(codes):
        return isinstance(value, type) and (value.__module__, value.__qualname__) == (module.__name__, qualname)
    function = undecorated(value)
    return (
        function is not None
        and not function.__closure__
        and function.__globals__ is vars(module)
        and any(code_key(function.__code__) == code_key(code) for code in codes)
    )


def is_filed_closure(function: FunctionType, module: ModuleType, qualname: str) -> bool:
    """Whether a function is one that a module's file has inside another, such as `decorator.<locals>.wrapper`."""
    if function.__globals__ is not vars(module):
        return False
    outermost, *names = qualname.split(".<locals>.")
    codes = _codes_of(module).get(outermost, [])
    for name in names:
        constants = [constant for code in codes for constant in code.co_consts if isinstance(constant, CodeType)]
        codes = [constant for constant in constants if constant.co_name == name]
    return any(code_key(function.__code__) == code_key(code) for code in codes)


class Reliance:
    """What code calls: the globals in it, and in the functions that these stand for.

    Attributes:
        problem: what was imported from elsewhere than its module's file says, when this was made.
        functions: the modules and the names of those whose code was looked through, and what they are to a reader.
        places: the modules that the globals are of, their names, and what they were.
        values: the same for `_C.unchanged`, with the modules' dictionaries.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self.functions: list[tuple[ModuleType, str, str]] = []
        self.places: list[tuple[ModuleType, str, Any]] = []
        self.values: list[Any] = []

    @classmethod
    def of_methods(cls, stock: type, methods: tuple[str, ...]) -> Reliance:
        """What methods of a class rely on."""
        made = cls()
        for method in methods:
            made._follow(*_place_of_method(stock, method), f"its class's {method}")
        return made

    @classmethod
    def of_globals(cls, module: ModuleType, *names: str) -> Reliance:
        """What a module's functions rely on, and that they are these functions."""
        made = cls()
        for name in names:
            made._add(module, name)
        return made

    def holds(self) -> bool:
        """Whether the globals are what they were; it runs at every forward."""
        if is_compiling():  # which knows what a module is, and compiles again when one has changed
            return all(getattr(module, name, None) is value for module, name, value in self.places)
        return unchanged(self.values, _NOTHING, _NOTHING)

    def why_not(self) -> str | None:
        """What is not as the files say, or was replaced since."""
        if self.problem:
            return self.problem
        for module, qualname, description in self.functions:
            if not _is_as_filed(module, qualname, _codes_of(module).get(qualname, [])):
                return f"{description} was replaced"
        if self.holds():
            return None
        for module, name, value in self.places:
            if vars(module).get(name) is not value:
                return _was_replaced(module, name)
        return "a kernel was put into a function that it calls"

    def _follow(self, module: ModuleType, qualname: str, description: str) -> None:
        self.functions.append((module, qualname, description))
        for code in _codes_of(module).get(qualname, ()):
            for name in global_names(code):
                self._add(module, name)

    def _add(self, module: ModuleType, name: str) -> None:
        if any(place[:2] == (module, name) for place in self.places):
            return
        value = vars(module).get(name)
        self.places.append((module, name, value))
        self.values += vars(module), name, value
        if isinstance(value, nn.Module):  # a function of the hub of kernels, into which one may be put
            self.values += vars(value), "forward", vars(value).get("forward")
        sources = _imports_of(module).get(name, ())
        source = next((source for source in sources if _imported(*source) is value), None)
        if source is not None:
            if source[1] is not None and isinstance(value, FunctionType) and not _is_foreign(source[0]):
                self._add(sys.modules[source[0]], source[1])
        elif name in _codes_of(module):
            self._follow(module, name, f"{name} of {module.__name__}")
        elif sources and _ASSIGNED not in sources:
            self.problem = self.problem or _was_replaced(module, name)


def _was_replaced(module: ModuleType, name: str) -> str:
    return f"{name} of {module.__name__} was replaced"


# ---- Methods of classes --------------------------------------------------------------------------------------------


def methods_key(stock: type, methods: tuple[str, ...]) -> tuple[Any, ...] | None:
    """The code of methods that a class's module defines, to be compared; None if it does not. A method that was
    replaced has its file's; whether others are what their file says is not asked here, to be fast."""
    keys = []
    for method in methods:
        owner = _owner(stock, method)
        module = sys.modules.get(stock.__module__)
        if owner is None or module is None or owner.__module__ != stock.__module__:
            return None
        function = undecorated(vars(owner)[method])
        if function is not None and function.__code__.co_filename == getattr(module, "__file__", None):
            keys.append(code_key(function.__code__))
        elif codes := _codes_of(module).get(f"{owner.__qualname__}.{method}"):
            keys.append(code_key(codes[0]))
        else:
            return None
    return tuple(keys)


def filed_key(module: ModuleType, class_name: str, methods: tuple[str, ...]) -> tuple[Any, ...] | None:
    """What `methods_key` is of a class by a module's file, whatever has become of it since."""
    codes = [_codes_of(module).get(f"{class_name}.{method}", []) for method in methods]
    return tuple(code_key(each[0]) for each in codes) if all(codes) else None


def same_methods(stock: type, module: ModuleType, class_name: str, methods: tuple[str, ...]) -> bool:
    """Whether methods of a class do the same as those of a module's class, by the files of these."""
    for method in methods:
        one, other = _definition(*_place_of_method(stock, method)), _definition(module, f"{class_name}.{method}")
        if not one.codes or not _same(one, other, set()):
            return False
    return True


def _owner(stock: type, method: str) -> type | None:
    return next((owner for owner in stock.__mro__ if method in vars(owner)), None)


def _place_of_method(stock: type, method: str) -> tuple[ModuleType, str]:
    owner = _owner(stock, method)
    assert owner is not None
    return sys.modules[owner.__module__], f"{owner.__qualname__}.{method}"
