"""Policies on their own: what a word opens, and what no name, wildcard or wide network ever opens."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsec.errors import DsecError, Forbidden, InvalidRequest
from dsec.network.policy import METADATA, parse, words
from dsec.network.proxy import Proxy
from dsec.types import Spec


def reached(network: Any, host: str, port: int = 443, names: dict[str, list[str]] | None = None) -> list[str]:
    """Where a request for that host would go; Forbidden as the proxy raises it. `names`: what the resolver answers."""

    async def resolve(name: str, port: int) -> list[str]:
        if names is None or name not in names:
            raise AssertionError(f"{name} was looked up")
        return names[name]

    return asyncio.run(Proxy(parse(words(network)), resolve).addresses(host, port))


def refused(network: Any, host: str, port: int = 443, names: dict[str, list[str]] | None = None) -> str:
    with pytest.raises(Forbidden) as caught:
        reached(network, host, port, names)
    return caught.value.message


def test_names() -> None:
    names = {"example.org": ["93.184.216.34"], "a.example.org": ["93.184.216.35"]}
    assert reached(["example.org"], "example.org", 80, names) == ["93.184.216.34"]
    assert reached(["example.org"], "EXAMPLE.org.", 80, names) == ["93.184.216.34"]
    assert reached(["*.example.org"], "a.example.org", 80, names) == ["93.184.216.35"]
    assert reached(["example.org:443"], "example.org", 443, names)
    for other in ("example.org.evil.net", "notexample.org", "evil.net"):
        refused(["example.org", "*.example.org"], other)  # and is not looked up: a lookup would tell its owner
    refused(["*.example.org"], "example.org")
    refused(["example.org:443"], "example.org", 80)
    refused(["example.org"], "93.184.216.34"), "an allowed name does not open its address"


def test_addresses_and_networks() -> None:
    assert reached(["93.184.216.34"], "93.184.216.34") == ["93.184.216.34"]
    assert reached(["10.1.0.0/16:80"], "10.1.2.3", 80) == ["10.1.2.3"]
    assert reached(["[2600:1f18::7]:443"], "[2600:1f18::7]") == ["2600:1f18::7"]
    refused(["10.1.0.0/16:80"], "10.1.2.3", 81)
    refused(["10.1.0.0/16"], "10.2.0.1")
    assert reached({"allow_out": ["8.8.8.8"], "deny_out": ["0.0.0.0/0"]}, "8.8.8.8")
    refused({"allow_out": ["8.8.8.8"], "deny_out": ["0.0.0.0/0"]}, "8.8.4.4")
    wide = ["*", "!93.184.0.0/16", "93.184.216.34"]
    assert reached(wide, "1.1.1.1") and reached(wide, "93.184.216.34"), "what is allowed by name of address wins"
    assert "denied" in refused(wide, "93.184.216.35")
    assert "denied" in refused(wide, "sneaky.net", 443, {"sneaky.net": ["93.184.216.35"]})


PRIVATE = (
    "127.0.0.1 127.9.9.9 10.0.0.1 172.16.3.4 192.168.1.1 169.254.1.1 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 "
    "::1 :: fe80::1 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2001:0:1::"
).split()


@pytest.mark.parametrize("address", [*PRIVATE, *sorted(map(str, METADATA))])
def test_nothing_wide_opens_what_is_not_public(address: str) -> None:
    """Not the whole Internet, not every network, and not a name whose owner points it here (DNS rebinding)."""
    for network in (["*"], ["0.0.0.0/0", "::/0"], ["*", "evil.net"], ["evil.net"]):
        assert refused(network, f"[{address}]" if ":" in address else address)
        assert refused(network, "evil.net", 443, {"evil.net": [address]})
    mixed = {"evil.net": [address, "93.184.216.34"]}
    assert reached(["evil.net"], "evil.net", 443, mixed) == ["93.184.216.34"]


def test_an_exact_word_opens_it() -> None:
    for address in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "fd00:ec2::254"):
        assert reached([address], address) == [address]
        assert reached([address, "internal.net"], "internal.net", 443, {"internal.net": [address]}) == [address]
    assert reached(["127.0.0.1"], "::ffff:127.0.0.1") == ["127.0.0.1"]
    assert reached(["192.168.0.0/16"], "192.168.1.1"), "private networks may be listed as such"
    for wide, address in (("127.0.0.0/8", "127.0.0.1"), ("169.254.0.0/16", "169.254.169.254")):
        assert "exact address" in refused([wide], address), "this host and metadata are never part of something"


def test_a_name_is_looked_up_once_and_its_address_pinned() -> None:
    """A resolver that answers something else the second time (the rebinding attack) is never asked twice."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    asked: list[str] = []
    connected: list[str] = []

    async def lying(name: str, port: int) -> list[str]:
        asked.append(name)
        return answers[min(len(asked), 2) - 1]

    async def work() -> None:
        async def note(host: str, port: int) -> Any:
            connected.append(host)
            raise OSError("no network in tests")

        real, asyncio.open_connection = asyncio.open_connection, note  # type: ignore[assignment]
        try:
            with pytest.raises(DsecError, match="cannot be reached"):
                await Proxy(parse(("evil.net",)), lying).connect("evil.net", 80)
        finally:
            asyncio.open_connection = real

    asyncio.run(work())
    assert asked == ["evil.net"] and connected == ["93.184.216.34"]


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "017700000001", "127.1", "a b", "a\r\nb", "", "-", "a" * 300]
)
def test_strange_hosts_are_names_or_nothing(host: str) -> None:
    """What a lenient resolver would take for an address is judged as the address it gives."""
    with pytest.raises((Forbidden, InvalidRequest)):
        reached(["*"], host, 80, {host: ["127.0.0.1"]})


@given(st.ip_addresses(), st.integers(1, 65535))
def test_a_policy_of_names_opens_no_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    assert parse(("example.org", "*.net")).refusal(address, port, named=False)
    if not address.is_global or address.is_multicast:
        assert parse(("*", "0.0.0.0/0", "::/0")).refusal(address, port, named=True)


def test_spellings_are_one() -> None:
    words_ = ("example.org", "in:8000", "!192.0.2.0/24", "*")
    given_ = {"allow_out": ["example.org"], "deny_out": ["192.0.2.0/24"], "allow_in": [8000]}
    assert Spec(network=given_).network == words_  # type: ignore[arg-type]
    assert Spec(network=words_).network == words_ and Spec(network=list(words_)).network == words_  # type: ignore[arg-type]
    assert Spec(allow_internet_access=True).network == ("*",)
    assert Spec(allow_internet_access=False).network == Spec(network=[]).network == "none"  # type: ignore[arg-type]
    spec = Spec(network=given_)  # type: ignore[arg-type]
    assert Spec.from_dict(spec.as_dict()) == spec == spec.but(timeout=300.0)
    bad: list[Any] = [
        "example.org",
        ["a/b"],
        ["10.1.2.3/8"],
        ["x:0"],
        ["x:99999"],
        ["!name"],
        ["in:x"],
        {"out": []},
        [5],
    ]
    for network in [*bad, ["*.*"], ["http://x"], {"allow_out": "x"}, ["1.2.3"], ["a:1-2-3"]]:
        with pytest.raises(InvalidRequest):
            Spec(network=network)
