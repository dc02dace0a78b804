"""Numbers as people write them, with their units: what counts as the same number.

    read_number("$1,234.50")        # Number(value=2469/2, units={"$"})
    read_number("1 1/2 hours")      # Number(value=3/2, units={"h"})
    read_number("7 not")            # None: "not" is no unit
    same_number("12 km", "12")      # True: one side may leave its unit out
    same_number("12 km", "12 m")    # False; and nothing is converted: "1 km" is not "1000 m"

A number is all of the text, at most 60 characters:

value     an integer or decimal (12, 3.5, .5), in groups of exactly three digits with commas or blanks between them
          (1,234.5 or 1 234.5; never 1.234,5 or 12,34, which are no numbers here); a fraction of whole numbers (3/4,
          ¾); a mixed number (1 1/2, 1½); scientific (6e23, 6 × 10^23, 6·10²³). A sign before it.
unit      none, or one of the list below, before or after a slash or "per" as well (km/h, euros per kilogram), with
          square or cubic (cm², square centimetres, cm^2); a currency's sign or code may stand before the value
percent   75%, 75 percent and 75 per cent are the same, and never 75 or 0.75

"3 million", "2 thirds", "4 pi" and "seven" are not read as numbers. Singular, plural and abbreviation are one unit. A
word that means several (pounds of money and of weight, degrees of angle and of either temperature) is the same as each.

Two numbers are the same where whole numbers are equal and others lie within a relative 1e-6 of each other, or, where
an item states a tolerance, where they differ by no more than that: an absolute amount, in the answer's own unit.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import product
from typing import NamedTuple

# what a unit is called here, and how it is written (plurals in s are added to words of three letters and more)
MEASURES = {
    "nm": "nm nanometre nanometer", "µm": "µm um micrometre micrometer", "mm": "mm millimetre millimeter",
    "cm": "cm cms centimetre centimeter", "m": "m metre meter", "km": "km kms kilometre kilometer",
    "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
    "mg": "mg milligram milligramme", "g": "g gram gramme", "kg": "kg kgs kilo kilogram kilogramme",
    "t": "tonne ton", "lb": "lb lbs pound", "oz": "oz ounce",
    "ms": "ms millisecond", "s": "s sec second", "min": "min minute", "h": "h hr hrs hour", "day": "day",
    "week": "wk week", "month": "month", "year": "yr yrs year",
    "ml": "ml millilitre milliliter", "cl": "cl centilitre centiliter", "l": "l litre liter",
    "gal": "gal gallon", "ha": "ha hectare", "acre": "acre",
    "°": "° deg degree", "rad": "rad radian", "°c": "°c celsius", "°f": "°f fahrenheit",
    "kelvin": "kelvin", "ohm": "ohm ω", "volt": "v volt", "watt": "w watt", "kw": "kw kilowatt",
    "kwh": "kwh kilowatt-hour", "ampere": "amp ampere", "joule": "joule", "newton": "newton", "hz": "hz hertz",
    "pascal": "pa pascal", "mol": "mol mole", "bit": "bit", "byte": "byte",
}  # fmt: skip
CURRENCIES = {
    "$": "$ us$ usd dollar", "€": "€ eur euro", "£": "£ gbp pound", "¥": "¥ jpy yen", "₹": "₹ inr rupee",
    "chf": "chf franc", "¢": "¢ cent",
}  # fmt: skip
# What is counted in the published eval sets and in problems like theirs; each is a unit of its own.
COUNTED = """
    apple ball bead bird book bottle box boxes boy bus buses cake candy candies card car cat chicken child children
    chromosome coin cookie cow diagonal digit divisor dog edge egg face fish flower friend game girl item kid leg man
    marble match matches matchstick men number orange page painter passenger pen pencil people person piece point
    roll rose seat side square stick sticker string student term ticket time tree way woman women word zero zeroes
""".split()
PLURAL = {"boxes": "box", "buses": "bus", "candies": "candy", "children": "child", "matches": "match", "men": "man"}
PLURAL |= {"women": "woman", "people": "person", "zeroes": "zero"}


def _written() -> dict[str, frozenset[str]]:
    """Every way of writing a unit → the units that it may mean."""
    found: dict[str, set[str]] = {}
    names = [(unit, name) for unit, row in (MEASURES | CURRENCIES).items() for name in row.split()]
    for unit, name in names + [(PLURAL.get(name, name), name) for name in COUNTED]:
        found.setdefault(name, set()).add(unit)
        if len(name) > 2 and not name.endswith("s"):
            found.setdefault(name + "s", set()).add(unit)
    found["degree"] = found["degrees"] = found["°"] = {"°", "°c", "°f"}
    for scale in ("c", "f"):
        name = {"c": "celsius", "f": "fahrenheit"}[scale]
        found |= {
            text: {f"°{scale}"} for text in (f"degrees {name}", f"degree {name}", f"degrees {scale}", f"° {scale}")
        }
    return {name: frozenset(units) for name, units in found.items()}


UNITS = _written()
WHOLE = {"%": "%", "percent": "%", "per cent": "%", "kph": "km/h", "kmh": "km/h", "km/hr": "km/h", "mph": "mi/h"}

NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?:(?P<currency>(?:us)?\$|[€£¥₹]|(?:usd|eur|gbp|jpy|inr|chf) ) ?(?P<inner>-?))?"
    r"(?:(?:(?P<whole>[0-9]+) )?(?P<top>[0-9]+) ?/ ?(?P<bottom>[0-9]+)"  # 3/4 or 1 1/2
    r"|(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:e(?P<e>[-+]?[0-9]{1,2})(?![0-9])| ?[×x*·] ?10\^\{?(?P<power>[-+]?[0-9]{1,2})\}?(?![0-9]))?)"
    r" ?(?P<unit>.*)"
)
LONGEST = 60
RELATIVE = Fraction(1, 10**6)
VULGAR = re.compile("[¼-¾⅐-⅞]")
RAISED = re.compile("10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


class Number(NamedTuple):
    value: Fraction
    # what the unit may be; empty where none is written
    units: frozenset[str]


def same_number(one: str, other: str, tolerance: float = 0.0) -> bool:
    """Whether both are numbers, and the same by the rule above."""
    a, b = read_number(one), read_number(other)
    if a is None or b is None or not _same_unit(a.units, b.units):
        return False
    difference = abs(a.value - b.value)
    if tolerance:
        return difference <= Fraction(str(tolerance))  # as it is written: 0.1 is a tenth
    if a.value.denominator == b.value.denominator == 1:
        return difference == 0
    return difference <= RELATIVE * max(abs(a.value), abs(b.value))


def read_number(text: str) -> Number | None:
    """The number that all of the text is, or None."""
    if len(text) > LONGEST:
        return None
    match = NUMBER.fullmatch(_spelled(text))
    value = _value(match) if match else None
    units = _units(match) if match else None
    return None if value is None or units is None else Number(value, units)


def _spelled(text: str) -> str:
    """In plain characters: `1½ Hours` → `1 1/2 hours`, `6·10²³` → `6·10^23`."""
    text = VULGAR.sub(
        lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\N{FRACTION SLASH}", "/"), text
    )
    text = RAISED.sub(lambda match: "10^" + match[1].translate(LOWERED), text)
    return " ".join(text.casefold().replace("\N{MINUS SIGN}", "-").replace("μ", "µ").split())


def _value(match: re.Match[str]) -> Fraction | None:
    if match["sign"] and match["inner"]:  # -$-5
        return None
    sign = -1 if "-" in (match["sign"], match["inner"]) else 1
    if match["top"]:
        whole, top, bottom = int(match["whole"] or 0), int(match["top"]), int(match["bottom"])
        if bottom == 0 or (match["whole"] and top >= bottom):
            return None
        return sign * (whole + Fraction(top, bottom))
    power = Fraction(10) ** int(match["e"] or match["power"] or 0)
    return sign * Fraction(match["digits"].replace(",", "").replace(" ", "")) * power


def _units(match: re.Match[str]) -> frozenset[str] | None:
    """What the unit may be, empty where there is none; None where it is not known or the currency stands twice."""
    before, after = (match["currency"] or "").strip(), _unit(match["unit"])
    if not before or after is None:
        return after
    currency = UNITS[before]
    return currency if not after or after & currency else None


def _unit(text: str) -> frozenset[str] | None:
    text = text.replace("^2", "²").replace("^3", "³").replace("sq.", "sq").strip()
    if not text:
        return frozenset()
    if text in WHOLE:
        return frozenset({WHOLE[text]})
    parts = [_part(part.strip()) for part in text.replace(" per ", "/").split("/")]
    if len(parts) > 2 or not all(parts):
        return None
    return frozenset("/".join(combination) for combination in product(*parts))


def _part(text: str) -> frozenset[str]:
    """`square metres` → {m²}; empty where it is not known."""
    for power, words in {"²": ("square ", "sq "), "³": ("cubic ", "cu ")}.items():
        bare = text.removesuffix(power)
        for word in words:
            bare = bare.removeprefix(word)
        if bare != text:
            return frozenset(unit + power for unit in UNITS.get(bare, ()))
    return UNITS.get(text, frozenset())


def _same_unit(one: frozenset[str], other: frozenset[str]) -> bool:
    if not one or not other:
        return "%" not in one | other or one == other
    return bool(one & other)
