"""Numbers and units: every way of writing one, and what is no number."""

from fractions import Fraction

import pytest

from lib.evaluation.numbers import COUNTED, UNITS, read_number, same_number


@pytest.mark.parametrize(
    "text, value",
    [
        ("12", 12), ("-12", -12), ("\u221212", -12), ("+12", 12), ("1,234,567.5", Fraction(2469135, 2)),
        ("1 234", 1234), ("1\u2009234", 1234), ("1\u202f234.5", Fraction(2469, 2)), (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)), ("1 1/2", Fraction(3, 2)), ("\u00be", Fraction(3, 4)), ("2\u2153", Fraction(7, 3)),
        ("-1 1/2", Fraction(-3, 2)), ("6e3", 6000), ("6 \u00d7 10^3", 6000), ("6\u00b710\u00b3", 6000),
        ("6 x 10^{-3}", Fraction(6, 1000)), ("$1,480.00", 1480), ("USD 5", 5), ("-$5", -5), ("$-5", -5),
        ("5 \u20ac", 5),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, value):
    assert read_number(text).value == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "seven", "7 not", "3 million", "5k", "2 thirds", "4 pi", "1.234,5", "12,34", "1,23,456", "1,2345",
     "12 34", "1 234,567", "1,234 567", "1 3/2", "3/0", "1/2/3", "1.2.3", "--5", "-$-5", "$5 \u20ac", "5 m/s/s", "m",
     "/", "1e999", "5 %%", "12 cm or 13 cm", "1" * 61, "\u00be\u00be"],
)  # fmt: skip
def test_what_is_no_number_is_none(text):
    assert read_number(text) is None


@pytest.mark.parametrize("name", UNITS)
def test_every_unit_of_the_list_is_read_and_is_the_same_as_none(name):
    assert read_number(f"7 {name}").units == UNITS[name]
    assert same_number(f"7 {name}", "7") and same_number("7", f"7 {name}")
    assert not same_number(f"7 {name}", "7%")


@pytest.mark.parametrize(
    "one, other",
    [("km", "kilometres"), ("km", "kilometer"), ("cm\u00b2", "square centimetres"), ("km/h", "kilometres per hour"),
     ("mph", "miles per hour"), ("%", "per cent"), ("feet", "ft"), ("people", "person"), ("boxes", "box"),
     ("pounds", "\u00a3"), ("pounds", "lb"), ("degrees", "\u00b0F"), ("\u2126", "ohms"), ("\u00b5m", "\u03bcm")],
)  # fmt: skip
def test_units_that_are_the_same(one, other):
    assert same_number(f"7 {one}", f"7 {other}") and same_number(f"7 {other}", f"7 {one}")


@pytest.mark.parametrize(
    "one, other",
    [("km", "m"), ("cm\u00b2", "cm"), ("cm\u00b2", "cm\u00b3"), ("km/h", "km"), ("lb", "\u00a3"),
     ("\u00b0C", "\u00b0F"), ("min", "m"), ("%", "cm"), ("dollars", "euros"), ("pens", "pencils"), ("h", "km/h")],
)  # fmt: skip
def test_units_that_are_not(one, other):
    assert not same_number(f"7 {one}", f"7 {other}")


def test_no_two_counted_things_are_the_same_but_singular_and_plural():
    assert [name for name in COUNTED if len(UNITS[name]) > 1] == []


def test_without_a_tolerance_whole_numbers_are_equal_and_others_nearly_so():
    assert not same_number("1000001", "1000000")
    assert same_number("0.3333333", "1/3") and not same_number("0.33333", "1/3")
    assert same_number("0", "-0") and not same_number("0.0000001", "0")


def test_a_tolerance_is_absolute_and_inclusive():
    assert same_number("0.3", "0.4", 0.1) and same_number("-0.1", "0", 0.1)
    assert not same_number("0.3", "0.41", 0.1)
    assert same_number("101", "100", 1) and not same_number("102", "100", 1)
