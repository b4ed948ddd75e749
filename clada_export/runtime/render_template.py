"""Render one chat template, in a process of its own: `python -I -S render_template.py FOLDER...`.

A script, not a module: it imports nothing of this package. The folders are where jinja2 and what it needs are found. stdin is
a JSON object with `template`, `values` and the bounds `memory` (bytes of address space), `seconds` (of CPU, and thrice that by
the clock) and `longest` (characters of the result); stdout is one with `text`, or with `error` and, if known, `line`. Nothing
on stdout means that the system ended the process at one of the bounds.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any


def main() -> None:
    """Read the request, and answer it within its bounds."""
    request = json.load(sys.stdin.buffer)
    sys.path[:0] = sys.argv[1:]
    # Jinja imports this one when a template fails; there may be no memory left by then.
    import jinja2.debug
    import jinja2.sandbox

    _bound(request["memory"], request["seconds"])
    try:
        text = _environment().from_string(request["template"]).render(request["values"])
        longest = request["longest"]
        answer: dict[str, Any] = {"text": text}
        if len(text) > longest:
            answer = {"error": f"it writes {len(text)} characters, and these messages can't need more than {longest}"}
    except MemoryError:
        answer = {"error": f"it wants more than {request['memory'] >> 20} MB of memory"}
    except RecursionError:
        answer = {"error": "it is nested too deeply, or calls itself without end"}
    except jinja2.TemplateSyntaxError as error:
        answer = {"error": f"syntax error: {error.message}", "line": error.lineno}
    # A template is a program: what it raises has no common base.
    except Exception as error:
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        answer = {"error": f"{kind}{error}", "line": _line(error)}
    sys.stdout.write(json.dumps(answer))


def _bound(memory: int, seconds: int) -> None:
    """Let the system end or refuse whatever goes beyond."""
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (value, value))
    # Should the caller be killed, nobody else would end a template that sleeps.
    signal.alarm(3 * seconds)


def _line(error: BaseException) -> int | None:
    """The template's line that raised an error."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates: the same sandbox, tags, filters and names."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationTag(Extension):
        """`{% generation %}` marks what the assistant says, for training; here it is only what it holds."""

        tags = {"generation"}  # noqa: RUF012  # as the base class has it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_held"), [], [], body).set_lineno(line)

        def _held(self, caller: Any) -> Any:
            return caller()

    class Dict:
        """The name `dict`, without the class's attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **kwargs)

    class PlainNamespace(Namespace):
        """A namespace without names that lead into Python's internals."""

        # The template's names are keywords: `self` may be one.
        def __init__(*args: Any, **kwargs: Any) -> None:
            names = dict(*args[1:], **kwargs)
            for name in names:
                _check_name(name)
            Namespace.__init__(args[0], names)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace can't have the attribute {name!r}: it begins with an underscore")

    def raise_exception(message: Any) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=PlainNamespace
    )
    return environment


if __name__ == "__main__":
    main()
