"""What makes one asynchronous core two SDKs: every public coroutine of a class, run on a loop of its own thread.

Also what all its methods have: `request_timeout`, and being called on the class with a sandbox's id.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from functools import wraps
from types import MethodType
from typing import Any, TypeVar

from dsec.client import Transport, default_transport
from dsec.errors import InvalidRequest, Timeout
from dsec.types import SandboxInfo

T = TypeVar("T")
Text = Callable[[str], Any]


async def within(seconds: float | None, name: str, work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(seconds or None):
            return await work
    except Timeout:
        raise
    except TimeoutError:
        raise Timeout(f"no answer to {name} within {seconds} s") from None


def bounded(cls: type[T]) -> type[T]:
    """Gives every public coroutine of the class `request_timeout`: seconds for its answer, then Timeout (what was asked
    may still be done). A command's own time is another matter, so `run` and `wait` say themselves what it means."""
    for name, value in list(vars(cls).items()):
        function = getattr(value, "function", getattr(value, "__func__", value))
        known = "request_timeout" in inspect.signature(function).parameters if callable(function) else True
        if name.startswith("_") or not inspect.iscoroutinefunction(function) or known:
            continue

        def bound(function: Any = function, name: str = name) -> Any:
            @wraps(function)
            async def call(self: Any, *args: Any, request_timeout: float | None = None, **keywords: Any) -> Any:
                return await within(request_timeout, name, function(self, *args, **keywords))

            return call

        setattr(cls, name, bound() if value is function else type(value)(bound()))
    return cls


class Either:
    """A method that is also called on the class, with a sandbox's id first: `box.kill()`, `Sandbox.kill(id)`."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, box: Any, owner: Any) -> Any:
        if box is not None:
            return MethodType(self.function, box)

        @wraps(self.function)
        async def call(id: str, *args: Any, transport: Transport | None = None, **keywords: Any) -> Any:
            return await self.function(owner._named(id, transport or default_transport()), *args, **keywords)

        return call


class _Page(list[SandboxInfo]):
    """Some sandboxes, and the way to the next ones."""

    def __init__(self, answer: dict[str, Any], ask: Any) -> None:
        super().__init__(SandboxInfo(**info) for info in answer["sandboxes"])
        self._ask, self._first = ask, True
        self.next_token: str | None = answer.get("next_token")

    @property
    def has_next(self) -> bool:
        """Whether `next_items` has more to give."""
        return self._first or self.next_token is not None

    async def _next(self) -> list[SandboxInfo]:
        if self._first:  # E2B's paginators begin with none
            self._first = False
            return list(self)
        if self.next_token is None:
            raise InvalidRequest("there are no more")
        answer = await self._ask(self.next_token)
        self.next_token = answer.get("next_token")
        return [SandboxInfo(**info) for info in answer["sandboxes"]]


class AsyncPage(_Page):
    async def next_items(self) -> list[SandboxInfo]:
        """These, then those of the page after, and so on. InvalidRequest when there are no more."""
        return await self._next()


class Page(_Page):
    def next_items(self) -> list[SandboxInfo]:
        """See AsyncPage."""
        return list(_wait(self._next(), queue.SimpleQueue()))


_TWINS: dict[type, type] = {}


class _Loop:
    """One event loop in a thread for all synchronous sandboxes of this process (a forked child makes its own)."""

    _lock = threading.Lock()
    _current: tuple[int, asyncio.AbstractEventLoop] | None = None

    @classmethod
    def end(cls) -> None:
        """Before the interpreter ends, so that nothing pending complains."""

        async def over() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if cls._current is not None and cls._current[0] == os.getpid():
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(over(), cls._current[1]).result(1)

    @classmethod
    def get(cls) -> asyncio.AbstractEventLoop:
        with cls._lock:
            if cls._current is None or cls._current[0] != os.getpid():
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name="dsec", daemon=True).start()
                cls._current = (os.getpid(), loop)
            return cls._current[1]


atexit.register(_Loop.end)


_Said = queue.SimpleQueue[tuple[Text, str] | None]
_said: ContextVar[_Said] = ContextVar("said")
"""Where the call that runs puts what is to be called in its caller's thread."""


def _wait(work: Any, said: _Said) -> Any:
    """The coroutine's result; callbacks run here, in the caller's thread, so they may use the sandbox."""
    _said.set(said)  # which the coroutine's task takes over
    future: Future[Any] = asyncio.run_coroutine_threadsafe(work, _Loop.get())
    future.add_done_callback(lambda _: said.put(None))
    try:
        while (item := said.get()) is not None:
            item[0](item[1])
        return _outside(future.result())
    except BaseException:
        future.cancel()
        raise


def _outside(value: Any) -> Any:
    """What the synchronous side sees: twins instead of async objects."""
    if isinstance(value, AsyncPage):
        page = Page.__new__(Page)
        page.extend(value)
        vars(page).update(vars(value))
        return page
    if isinstance(value, list):
        return [_outside(each) for each in value]
    if inspect.isasyncgen(value):
        return _pulled(value)
    twin = _TWINS.get(type(value))
    return value if twin is None else twin._of(value)  # type: ignore[attr-defined]


def _pulled(pieces: Any) -> Iterator[Any]:
    """An asynchronous iterator from outside."""
    done = object()
    try:
        while (piece := _wait(anext(pieces, done), queue.SimpleQueue())) is not done:
            yield piece
    finally:
        _wait(pieces.aclose(), queue.SimpleQueue())


def _spoken(name: str, value: Any) -> Any:
    """A callback as the loop calls it: in the thread of whichever call is going on then (a handle keeps callbacks)."""
    if name in ("on_event", "on_exit"):
        raise InvalidRequest(f"{name} is for AsyncSandbox; here the handle's get_new_events() tells")
    return lambda text: _said.get().put((value, text))


def _method(function: Any, of_class: bool) -> Any:
    names = list(inspect.signature(function).parameters)[1:]

    @wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*zip(names, args), *kwargs.items()]
        spoken = {name: _spoken(name, value) for name, value in given if name.startswith("on_") and callable(value)}
        args = tuple(spoken.pop(name, value) for name, value in zip(names, args)) + args[len(names) :]
        kwargs |= spoken
        return _wait(function(self._core, *args, **kwargs), queue.SimpleQueue())

    return classmethod(call) if of_class else call


def _passed(name: str) -> Callable[[Any], Any]:
    return lambda self: getattr(self._core, name)


class _EitherTwin:
    """See Either."""

    def __init__(self, name: str, either: Either) -> None:
        self._name, self._either, self.__doc__ = name, either, either.__doc__

    def __get__(self, box: Any, owner: Any) -> Any:
        bound = self._either.__get__(box._core if box is not None else None, owner._core)

        @wraps(bound)
        def call(*args: Any, **kwargs: Any) -> Any:
            return _wait(bound(*args, **kwargs), queue.SimpleQueue())

        return call


def twin(core: type[T], name: str) -> Any:
    """The synchronous class of an asynchronous one."""
    body: dict[str, Any] = {"__doc__": core.__doc__, "_core": core, "__module__": __name__}

    def of(cls: Any, value: Any) -> Any:
        self = object.__new__(cls)
        self._core = value
        for key, part in vars(value).items():
            if not key.startswith("_"):
                setattr(self, key, _outside(part))
        return self

    body["_of"] = classmethod(of)
    body["__repr__"] = lambda self: f"{name}({getattr(self, 'id', '')!r})"
    for base in reversed(core.__mro__):
        for key, value in vars(base).items():
            plain = value.__func__ if isinstance(value, classmethod) else value
            if inspect.iscoroutinefunction(plain) and not key.startswith("_"):
                body[key] = _method(plain, isinstance(value, classmethod))
            elif isinstance(value, Either):
                body[key] = _EitherTwin(key, value)
            elif isinstance(value, property) and not key.startswith("_"):
                body[key] = property(_passed(key), doc=value.__doc__)
    if "kill" in body and "create" in body and name == "Sandbox":
        body["__enter__"] = lambda self: self
        body["__exit__"] = lambda self, *_: (self.kill(), None)[1]
    twin = type(name, (), body)
    _TWINS[core] = twin
    return twin
