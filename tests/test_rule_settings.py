"""Settings of rules: what fits is taken, and what does not is refused with its place and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline import loader
from pipeline.document import parse
from pipeline.errors import ConfigError
from pipeline.rules import RULES, Rule, ServerRule
from pipeline.settings import Settings

SERVER = "rule: server, url: 'https://rewards.example.com/v1', hosts: [rewards.example.com]"


class Rewarded(Settings):
    """Anything that takes rules."""

    rules: list[Rule]


def problems(rule: str) -> list[str]:
    """What is said of a rule in a configuration."""
    with pytest.raises(ConfigError) as caught:
        loader._validate(parse(f"rules:\n- {{rule: exact}}\n- {{{rule}}}\n", "c.yaml"), Rewarded)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("rule: exakt", "rules.1: unknown rule `exakt`; did you mean `exact`?"),
        ("rule: 5", "rules.1: unknown rule `5` (known: exact, "),
        ("weight: 2", "rules.1: `rule` is missing (known: exact, "),
        ("rule: exact, weight: 0", "rules.1: weight=0 does nothing: leave the rule out"),
        ("rule: exact, weight: true", "rules.1.weight: should be a number, not true or false"),
        ("rule: exact, weight: .nan", "rules.1.weight: input should be a finite number"),
        ("rule: length, words: 3, wrods: 3", "rules.1.wrods: unknown setting; did you mean `words`?"),
        ("rule: pattern, expression: a, expresion: b", "rules.1.expresion: unknown setting; did you mean `expr"),
        ("rule: length", "rules.1.words: missing"),
        ("rule: length, words: 0", "rules.1.words: input should be greater than 0"),
        ("rule: repetition, n: 1.5", "rules.1.n: input should be a valid integer"),
        ("rule: pattern, expression: 'a('", "rules.1.expression: is not a regular expression of Python's: missing )"),
        ("rule: pattern, expression: 'a{99999999999}'", "rules.1.expression: is not a regular expression"),
        ("rule: pattern, expression: ''", "rules.1.expression: string should have at least 1 character"),
        ("rule: format, layout: tags", "rules.1: layout=tags needs `tags`"),
        ("rule: format, layout: json, tags: [a]", "rules.1: layout=tags needs `tags`"),
        ("rule: format, layout: tags, tags: [a, b, a]", "rules.1: a part is named twice in `tags`"),
        ("rule: format, layout: tags, tags: ['a b']", "rules.1.tags.0: string should match pattern"),
        (f"{SERVER}, retries: 11", "rules.1.retries: input should be less than or equal to 10"),
        (f"{SERVER}, timeout: 0", "rules.1.timeout: input should be greater than 0"),
        (f"{SERVER}, token_variable: 'a b'", "rules.1.token_variable: string should match pattern"),
        ("rule: server, url: 'http://localhost'", "rules.1.hosts: missing"),
        ("rule: server, url: 'http://localhost', hosts: []", "rules.1.hosts: list should have at least 1 item"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_at_its_line(rule: str, message: str) -> None:
    (found,) = problems(rule)
    assert found.startswith(f"c.yaml:3: {message}")


@pytest.mark.parametrize(
    ("url", "hosts", "message"),
    [
        ("ftp://a.example/", ["a.example"], "url: should begin with http:// or https://"),
        ("file:///etc/passwd", ["a.example"], "url: should begin with http:// or https://"),
        ("http://", ["a.example"], "url: should begin with http:// or https://"),
        ("a.example/v1", ["a.example"], "url: should begin with http:// or https://"),
        ("http://ann:s3cret@a.example/", ["a.example"], "holds a user or password"),
        ("http://@a.example/", ["a.example"], "holds a user or password"),
        ("http://a.example\\@b.example/", ["a.example", "b.example"], "holds a user or password"),
        ("http://a.example/?key=s3cret", ["a.example"], "leave out what begins with ? or #"),
        ("http://a.example/#s3cret", ["a.example"], "leave out what begins with ? or #"),
        ("http://a.example/a b", ["a.example"], "only printable ASCII"),
        ("http://a.example/\r\nHost: b", ["a.example"], "only printable ASCII"),
        ("http://\u0430.example/", ["\u0430.example"], "only printable ASCII"),
        ("http://a.example:99999/", ["a.example"], "url: should begin with http:// or https://"),
        ("http://ann:s3cret/", ["ann"], "url: should begin with http:// or https://"),
        ("http://[::1/", ["[::1]"], "url: should begin with http:// or https://"),
        ("http://b.example/", ["a.example"], "`b.example:80` is not among `hosts`"),
        ("http://a.example.b.example/", ["a.example"], "is not among `hosts`"),
        ("http://sub.a.example/", ["a.example"], "is not among `hosts`"),
        ("http://a.example./", ["a.example"], "is not among `hosts`"),
        ("http://a.example:8080/", ["a.example:80"], "`a.example:8080` is not among `hosts`"),
        ("http://a.example:443/", ["https://a.example"], "an entry should be a host, or host:port"),
        ("http://a.example/", ["*.example", "a.example/v1"], "an entry should be a host, or host:port"),
        ("http://a.example/", ["a.example:x"], "an entry should be a host, or host:port"),
        ("http://a.example/", ["[::1"], "an entry should be a host, or host:port"),
        ("http://a.example/", ["::1"], "an entry should be a host, or host:port"),
        ("http://a.example/", ["ann@a.example"], "an entry should be a host, or host:port"),
        ("http://127.0.0.1/", ["localhost"], "`127.0.0.1:80` is not among `hosts`"),
        ("http://localhost/", ["127.0.0.1"], "`localhost:80` is not among `hosts`"),
    ],
)
def test_an_address_that_is_not_plain_or_not_allowed_is_refused(url: str, hosts: list[str], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ServerRule(url=url, hosts=hosts)
    (error,) = caught.value.errors()
    assert message in error["msg"]
    assert "s3cret" not in error["msg"]


@pytest.mark.parametrize(
    ("url", "hosts", "host", "port"),
    [
        ("https://A.example/v1", ["a.EXAMPLE"], "a.example", 443),
        ("http://a.example", ["a.example:80"], "a.example", 80),
        ("http://a.example:8080/", ["b.example", "a.example"], "a.example", 8080),
        ("http://[::1]:9/", ["[::1]:9"], "::1", 9),
        ("http://10.0.0.7:9/", ["10.0.0.7"], "10.0.0.7", 9),
    ],
)
def test_an_address_is_allowed_by_its_host_and_where_one_is_given_its_port(
    url: str, hosts: list[str], host: str, port: int
) -> None:
    found = ServerRule(url=url, hosts=hosts)
    assert (found.host, found.port) == (host, port)


def test_a_token_travels_encrypted_unless_it_stays_on_this_machine() -> None:
    for url in ("https://a.example/", "http://localhost/", "http://127.0.0.1/", "http://[::1]/"):
        host = url.split("/")[2]
        assert ServerRule(url=url, hosts=[host], token_variable="TOKEN").token_variable == "TOKEN"
    for host in ("a.example", "10.0.0.7"):
        with pytest.raises(ValidationError, match="a token would be sent in the clear: use https"):
            ServerRule(url=f"http://{host}/", hosts=[host], token_variable="TOKEN")


def test_rules_are_what_they_were_after_being_written_and_read() -> None:
    given: list[dict[str, Any]] = [
        {"rule": "numeric", "weight": -2},
        {"rule": "format", "layout": "tags", "tags": ["think"]},
        {"rule": "server", "url": "http://localhost:1/", "hosts": ["localhost"]},
    ]
    read = TypeAdapter(list[Rule]).validate_python(given)
    assert [type(each) for each in read] == [RULES[each["rule"]] for each in given]
    assert TypeAdapter(list[Rule]).validate_python([each.model_dump(mode="json") for each in read]) == read
