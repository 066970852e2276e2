"""Network policies. A policy is a tuple of words, which is how Spec.network keeps it:

    example.org     a host name      *.example.org   the names below it      each with :443 or :8000-8100, else any port
    10.1.2.3        an address       10.1.0.0/16, 2001:db8::/32, [2001:db8::1]:443
    *               every public address              !192.0.2.0/24          but not these
    in:8000         the port inside that get_host() may forward to; "in:*" every one

What is not public (private, loopback, link-local, multicast, carrier-grade NAT ...) is reached only through a word that
is an address or network of its kind, never through a name, "*" or 0.0.0.0/0: a name whose owner points it at 127.0.0.1
leads nowhere. Metadata services and this host's own addresses (its API server, its Edge) need the exact address.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsec.errors import InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254 169.254.170.2 100.100.100.200 168.63.129.16 192.0.0.192 fd00:ec2::254 fd20:ce::254".split()
    )
)
"""Where clouds answer a machine's questions, with its credentials."""
ANY = (0, 65535)
_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9_][a-z0-9_-]{0,62}\.)*[a-z0-9_][a-z0-9_-]{0,62}")
_KEYS = ("allow_out", "deny_out", "allow_in")


@dataclass(frozen=True)
class Rule:
    """One word: a name (perhaps "*.below") or a network, and ports."""

    name: str
    net: Network | None
    ports: tuple[int, int]

    def covers(self, port: int) -> bool:
        return self.ports[0] <= port <= self.ports[1]

    def matches(self, host: str) -> bool:
        """Whether a lower-case name is meant; "*.x" means what is below x."""
        return host.endswith(self.name[1:]) and host != self.name[1:] if self.name[:1] == "*" else host == self.name


@dataclass(frozen=True)
class Policy:
    """What may be reached and from where; made by `parse`."""

    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()
    internet: bool = False
    ports: tuple[tuple[int, int], ...] = ()
    """Ports inside that may be forwarded to."""

    @property
    def outwards(self) -> bool:
        return self.internet or bool(self.allow)

    def knows(self, host: str, port: int) -> bool:
        """Whether a word names this host. A name that none does is not even looked up (a lookup tells its owner)."""
        return any(rule.net is None and rule.matches(host) and rule.covers(port) for rule in self.allow)

    def refusal(self, address: Address, port: int, named: bool) -> str:
        """Why this (plain) address may not be reached, "" if it may. `named`: an allowed name resolved to it."""
        listed = [rule.net for rule in self.allow if rule.net is not None and address in rule.net and rule.covers(port)]
        if any(net.num_addresses == 1 for net in listed):
            return ""
        if address in METADATA:
            return f"{address} is a metadata service; only its exact address in the policy opens it"
        if ours(address):
            return f"{address} is this host; only its exact address in the policy opens it"
        if not public(address):
            return "" if any(not net.is_global for net in listed) else f"{address} is not a public address"
        if listed or named:
            return ""
        if not self.internet:
            return f"{address} is not in the policy"
        denied = any(rule.net is not None and address in rule.net and rule.covers(port) for rule in self.deny)
        return f"{address} is denied by the policy" if denied else ""

    def lets_in(self, port: int) -> bool:
        return any(low <= port <= high for low, high in self.ports)


def plain(address: Address) -> Address:
    """An IPv4 address in IPv6 clothes (::ffff:127.0.0.1) as what it is."""
    return getattr(address, "ipv4_mapped", None) or address


def public(address: Address) -> bool:
    """Whether it is an ordinary address of the Internet. Tunnels into IPv4 (6to4, Teredo, NAT64) are not."""
    if isinstance(address, ipaddress.IPv6Address):
        tunnel = address.sixtofour or address.teredo or address in ipaddress.ip_network("64:ff9b::/32")
        if tunnel or address.is_site_local or not address.exploded.startswith(("2", "3")):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved and not address.is_unspecified


def ours(address: Address) -> bool:
    """Whether this host has the address: only then can a socket be bound to it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind((str(address), 0))
    except OSError:
        return False
    return not address.is_multicast


def words(network: Any, internet: bool | None = None) -> str | tuple[str, ...]:
    """The words of what a caller gave: "none", words, or E2B's {"allow_out": [...], "deny_out": [...]} with allow_in, a
    list of ports. `internet` is E2B's allow_internet_access; here it is off unless asked for. Raises InvalidRequest.
    """
    if network in ("none", None, ()):
        found: list[str] = []
    elif isinstance(network, dict):
        for key in network:
            if key not in _KEYS:
                raise InvalidRequest(f"network has no {key!r}; it has {', '.join(_KEYS)}")
        lists = [network.get(key) or [] for key in _KEYS]
        if not all(isinstance(each, list | tuple) for each in lists):
            raise InvalidRequest(f"network's {', '.join(_KEYS)} are lists, not {network!r:.200}")
        allow, deny, ports = ([str(word) for word in each] for each in lists)
        whole = "0.0.0.0/0" in deny  # E2B's ALL_TRAFFIC: what is not allowed is denied, which is how we begin
        found = [*allow, *(f"in:{port}" for port in ports)]
        found += [f"!{word}" for word in deny if word not in ("0.0.0.0/0", "::/0")]
        if deny and not whole:
            internet = internet is not False
    elif isinstance(network, list | tuple) and all(isinstance(word, str) for word in network):
        found = list(network)
    else:
        text = f'network is "none", a list of hosts, or a dict of {", ".join(_KEYS)}; not {network!r:.200}'
        raise InvalidRequest(text)
    if internet:
        found.append("*")
    result = tuple(dict.fromkeys(word.strip() for word in found))
    parse(result)
    return result or "none"


def parse(network: str | Iterable[str]) -> Policy:
    """The policy of some words. Raises InvalidRequest naming the one that means nothing."""
    allow, deny, ports = [], [], []
    internet = False
    for word in () if network == "none" else network:
        if word == "*":
            internet = True
        elif word.startswith("in:"):
            ports.append(ANY if word == "in:*" else _ports(word[3:], word))
        elif word.startswith("!"):
            rule = _rule(word[1:])
            if rule.net is None:
                raise InvalidRequest(f"network: {word!r} denies a name; only addresses can be denied")
            deny.append(rule)
        else:
            allow.append(_rule(word))
    return Policy(tuple(allow), tuple(deny), internet, tuple(ports))


def _ports(text: str, word: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?", text) or not 0 < int(low) <= int(high or low) < 65536:
        raise InvalidRequest(f"network: {word!r} has no port from 1 to 65535")
    return int(low), int(high or low)


def _rule(word: str) -> Rule:
    host, ports = word, ""
    if word.startswith("["):
        host, _, rest = word[1:].partition("]")
        ports = rest.removeprefix(":")
    elif word.count(":") == 1:
        host, _, ports = word.partition(":")
    span = _ports(ports, word) if ports else ANY
    try:
        return Rule("", ipaddress.ip_network(host), span)
    except ValueError:
        name = host.lower().rstrip(".")
        bare = name.removeprefix("*.")
        if not _NAME.fullmatch(bare) or bare.replace(".", "").isdigit() or "/" in host:
            text = f"network: {word!r} is neither a host name, an address, nor a network (host bits must be zero)"
            raise InvalidRequest(text) from None
        return Rule(name, None, span)


def host_name(text: str) -> str:
    """A name as it is compared: lower case, no final dot. Raises InvalidRequest for what is no name."""
    name = text.lower().rstrip(".")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{text!r:.100} is no host name")
    return name
