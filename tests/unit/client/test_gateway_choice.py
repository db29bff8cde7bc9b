"""Which gateway a call goes to."""

from collections import Counter

import pytest

from cluster.client.addresses import AddressBook, parse_addresses
from cluster.errors import InvalidRequest

ADDRESSES = ("a:1", "b:1", "c:1", "d:1")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def create_book(addresses=ADDRESSES, connected=(), clock=None):
    return AddressBook(addresses, connected=lambda address: address in connected, clock=clock or Clock())


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("h:1", ("h:1",)),
        ("h1:1,h2:2", ("h1:1", "h2:2")),
        (" h1:1 , [::1]:2,h1:1,", ("h1:1", "[::1]:2")),
        (["h1:1", "h2:2,h3:3"], ("h1:1", "h2:2", "h3:3")),
    ],
)
def test_addresses_come_with_commas_or_in_a_list(given, parsed):
    assert parse_addresses(given) == parsed


@pytest.mark.parametrize("given", ["", " , ", []])
def test_no_address_is_refused(given):
    with pytest.raises(InvalidRequest, match="host:port"):
        parse_addresses(given)


def test_a_name_keeps_its_gateway_in_every_client_and_names_spread():
    names = [f"req-{i}" for i in range(4000)]
    book, other = create_book(), create_book(ADDRESSES[::-1])
    picked = [book.pick(name) for name in names]
    assert picked == [other.pick(name) for name in names]
    assert all(850 < count < 1150 for count in Counter(picked).values())


def test_a_lost_gateways_names_spread_over_the_others_and_nobody_elses_move():
    book = create_book()
    names = [f"req-{i}" for i in range(3000)]
    before = {name: book.pick(name) for name in names}
    book.report_lost("b:1")
    after = {name: book.pick(name) for name in names}
    assert all(after[name] == gateway for name, gateway in before.items() if gateway != "b:1")
    moved = Counter(after[name] for name, gateway in before.items() if gateway == "b:1")
    assert set(moved) == {"a:1", "c:1", "d:1"} and min(moved.values()) > 150


def test_untried_ones_go_first_then_any_that_is_up_then_the_names_own():
    book = create_book(("a:1", "b:1"))
    first, second = book.ranked("x")
    assert book.pick("x", tried={first}) == second
    assert book.pick("x", tried={first, second}) == first
    book.report_lost(first)
    assert book.pick("x", tried={second}) == second
    book.report_lost(second)
    assert book.pick("x") == first


def test_one_that_drains_rests_a_while():
    clock = Clock()
    book = create_book(("a:1", "b:1"), clock=clock)
    first, second = book.ranked("x")
    book.report_draining(first)
    assert book.pick("x") == second
    clock.now = 4.9
    assert book.pick("x") == second
    clock.now = 5.0
    assert book.pick("x") == first
