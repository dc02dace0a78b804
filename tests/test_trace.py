"""The trace record: what is read, what is refused, and what makes two traces the same."""

import json
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import RequestError
from lib.trace import (
    MAX_BYTES,
    MAX_DEPTH,
    NAMESPACE,
    InvalidTrace,
    Trace,
    canonical,
    content_sha256,
    make_trace,
    parse_trace,
    read_entries,
    read_strictly,
    shown,
    to_entry,
    to_json,
)

TOY = {
    "trace_version": "1.0",
    "prompt": "2+2?",
    "steps": [{"i": 0, "type": "step", "content": "2+2=4"}],
    "final_answer": "4",
    "meta": {"source": "builtin"},
}


NOW = "2025-06-01T12:00:00.000000Z"


def toy(**changes) -> bytes:
    return json.dumps(TOY | changes).encode()


def refused(line: bytes) -> InvalidTrace:
    with pytest.raises(InvalidTrace) as caught:
        parse_trace(line)
    assert str(caught.value).isprintable()
    assert len(caught.value.got) <= 80
    return caught.value


def test_a_trace_reads_as_it_is_written():
    trace = parse_trace(toy())
    assert (trace.prompt, trace.steps[0].content, trace.final_answer) == ("2+2?", "2+2=4", "4")
    assert parse_trace(to_json(trace)) == trace


def test_id_is_the_uuid5_of_the_canonical_content():
    trace = parse_trace(toy())
    assert trace.id == str(uuid.uuid5(NAMESPACE, canonical(trace).decode()))
    assert parse_trace(toy(id="mine")).id == "mine"


def test_canonical_form_is_sorted_compact_json_without_id_and_time():
    given = parse_trace(toy(id="mine", created_at="2025-01-01T00:00:00Z", prompt="é 😀", meta={"b": 1, "a": [0.5]}))
    content = {key: value for key, value in json.loads(to_json(given)).items() if key not in ("id", "created_at")}
    content["steps"] = [["step", "2+2=4"]]
    expected = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical(given) == expected.encode()


@pytest.mark.parametrize("one, other", [("1.0", "1.00"), ("0.0", "-0.0"), ("1e5", "100000.0"), ("[-0.0]", "[0e0]")])
def test_equal_floats_canonicalise_equally(one: str, other: str):
    def line(number: str) -> bytes:
        return toy(meta={"x": "NUMBER"}).replace(b'"NUMBER"', number.encode())

    assert content_sha256(parse_trace(line(one))) == content_sha256(parse_trace(line(other)))
    assert content_sha256(parse_trace(line("1"))) != content_sha256(parse_trace(line("1.0")))


def test_key_order_blanks_and_escapes_leave_no_mark():
    backwards = json.dumps(dict(reversed(TOY.items())), indent=2).replace("2+2?", "2\\u002b2?").encode()
    assert content_sha256(parse_trace(backwards)) == content_sha256(parse_trace(toy()))
    assert content_sha256(parse_trace(toy(meta={}))) == content_sha256(parse_trace(_without(TOY, "meta")))


def test_steps_come_in_the_order_of_i():
    steps = [{"i": i, "type": "step", "content": str(i)} for i in (7, 0, 3)]
    trace = parse_trace(toy(steps=steps))
    assert [step.content for step in trace.steps] == ["0", "3", "7"]
    assert trace.id == parse_trace(toy(steps=steps[::-1])).id


def test_gaps_in_the_numbering_of_steps_leave_no_mark_but_order_type_and_content_do():
    def of(*steps: tuple[int, str, str]) -> str:
        named = [{"i": i, "type": type, "content": content} for i, type, content in steps]
        return content_sha256(parse_trace(toy(steps=named)))

    plain = of((0, "a", "x"), (1, "b", "y"))
    assert of((3, "a", "x"), (700, "b", "y")) == plain
    others = [of((0, "b", "y"), (1, "a", "x")), of((0, "a", "x"), (1, "c", "y")), of((0, "a", "x"), (1, "b", "z"))]
    assert plain not in others


def test_created_at_is_brought_to_utc():
    trace = parse_trace(toy(created_at="2025-01-01T01:30:00+02:00"))
    assert trace.created_at == "2024-12-31T23:30:00.000000Z"
    assert parse_trace(to_json(trace)) == trace


@pytest.mark.parametrize(
    "time", ["2025-01-01T00:00:00", "yesterday", "2025-13-01T00:00:00Z", "0001-01-01T00:00:00+05:00"]
)
def test_created_at_without_zone_or_sense_is_refused(time: str):
    assert refused(toy(created_at=time)).field == "created_at"


def test_unknown_version_is_refused_by_name():
    fault = refused(toy(trace_version="2.0", new_field=1))
    assert (fault.field, fault.got) == ("trace_version", "'2.0'") and "'1.0'" in fault.expected


def test_make_trace_holds_to_the_same_bounds():
    made = make_trace("2+2?", [("step", "2+2=4")], "4", {"source": "builtin"})
    assert content_sha256(made) == content_sha256(parse_trace(toy())) and made.created_at.endswith("Z")
    for wrong in ({"x": float("nan")}, {"x": 2**63}, {"x": "\0"}, {"x": "\ud800"}, {"x": {1}}):
        with pytest.raises(InvalidTrace):
            make_trace("2+2?", [("step", "2+2=4")], "4", wrong)
    with pytest.raises(RequestError, match="field steps"):
        make_trace("2+2?", [], "4", {})


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_f01_cut_line_is_refused(cut: int):
    assert refused(toy()[:cut]).expected == "valid JSON"


@pytest.mark.parametrize(
    "changes, field, got",
    [
        ({"steps": [TOY["steps"][0], {"i": "x", "type": "step", "content": "c"}]}, "steps[1].i", "'x'"),
        ({"steps": [{"i": 1.0, "type": "step", "content": "c"}]}, "steps[0].i", "1.0"),
        ({"steps": [{"i": True, "type": "step", "content": "c"}]}, "steps[0].i", "true"),
        ({"steps": [{"i": -1, "type": "step", "content": "c"}]}, "steps[0].i", "-1"),
        ({"steps": {}}, "steps", "an object"),
        ({"prompt": 5}, "prompt", "5"),
        ({"final_answer": None}, "final_answer", "null"),
        ({"meta": []}, "meta", "a list"),
        ({"id": 7}, "id", "7"),
    ],
)
def test_f02_wrong_type_is_refused_without_coercion(changes: dict, field: str, got: str):
    fault = refused(toy(**changes))
    assert (fault.field, fault.got) == (field, got)


def test_f02_what_is_no_object_is_refused():
    for line in (b"[]", b"7", b'"x"', b"null"):
        assert refused(line).field == "record"


def test_f03_unknown_key_is_refused_nested_too_and_meta_keys_are_kept():
    assert refused(toy(rationale="r")).field == "rationale"
    nested = [{"i": 0, "type": "step", "content": "c", "score": 1}]
    assert refused(toy(steps=nested)).field == "steps[0].score"
    meta = {"late": {"deep": [1, None, False]}}
    assert parse_trace(toy(meta=meta)).meta == meta


@pytest.mark.parametrize("missing", ["trace_version", "prompt", "steps", "final_answer"])
def test_f03_missing_field_is_refused(missing: str):
    assert refused(_without(TOY, missing)).field == missing


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
def test_f04_numbers_that_are_not_finite_are_refused(number: bytes):
    fault = refused(toy(meta={"x": [0, "NUMBER"]}).replace(b'"NUMBER"', number))
    assert (fault.field, fault.expected) == ("meta.x[1]", "a finite number")


@pytest.mark.parametrize("digits", [str(2**63), str(2**64), str(-(2**63) - 1), str(2**200), "1" * 5000])
def test_f05_integer_beyond_64_bits_is_refused(digits: str):
    raw = toy(meta={"x": {"y": "NUMBER"}}).replace(b'"NUMBER"', digits.encode())
    assert refused(raw).field == "meta.x.y"
    assert refused(toy().replace(b'"i": 0', b'"i": ' + digits.encode())).field == "steps[0].i"


def test_f05_the_largest_integers_are_read():
    extremes = [2**63 - 1, -(2**63)]
    assert parse_trace(toy(meta={"x": extremes})).meta == {"x": extremes}


@pytest.mark.parametrize(
    "old, new, field",
    [
        (b'"prompt": ', b'"prompt": "first", "prompt": ', "prompt"),
        (b'"prompt": ', b'"pro\\u006dpt":"first","prompt": ', "prompt"),
        (b'"i": 0', b'"i": 0, "i" : 0', "steps[0].i"),
        (b'"i": 0', b'"i": 0, "i"\r\n\t: 0', "steps[0].i"),
        (b'"source": ', b'"source":{"a":1,"a":2},"b":', "meta.source.a"),
        (b'"meta": ', b'"meta":{},"meta": ', "meta"),
        (b'"meta": {"source": "builtin"}', b'"meta":{},"meta":{}', "meta"),
    ],
)
def test_f06_repeated_key_is_refused(old: bytes, new: bytes, field: str):
    assert old in toy()
    assert refused(toy().replace(old, new)).field == field


def test_f06_text_that_looks_like_keys_is_no_repetition():
    text = 'he said "prompt": "prompt" : \\": {"a":1,"a":2}'
    assert parse_trace(toy(prompt=text)).prompt == text


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xed\xa0\x80"])
def test_f08_bad_utf8_is_refused(bad: bytes):
    assert refused(toy().replace(b"2+2?", bad)).expected == "valid UTF-8"


@pytest.mark.parametrize("escape", [rb"\ud800", rb"\udc00", rb"\ud800abcdefgh", rb"\ude00\ud83d"])
def test_f08_lone_surrogate_is_refused(escape: bytes):
    fault = refused(toy().replace(b"2+2?", escape))
    assert (fault.field, fault.expected) == ("prompt", "text without lone surrogates")


@pytest.mark.parametrize("old", [b"2+2?", b"2+2=4", b"builtin", b"source"])
def test_f08_nul_is_refused_wherever_it_stands(old: bytes):
    assert refused(toy().replace(old, rb"a\u0000b")).expected == "text without NUL"
    assert refused(toy().replace(old, b"a\0b")).field == "record"


@pytest.mark.parametrize("text", ["\\", "x\\", '"', '\\"', '\\\\"', '":"', "\\\\", "", "\\u0022"])
def test_f06_no_text_with_quotes_and_backslashes_hides_a_repeated_key_or_feigns_one(text: str):
    line = toy(prompt=text + "p", final_answer=text + "f", meta={text: text, "last": text + "\\"})
    assert parse_trace(line).meta == {text: text, "last": text + "\\"} and read_entries([line], NOW)
    for old, new in ((b'"meta"', b'"meta":{},"meta"'), (b'"i"', b'"i":0,"i"'), (b'"last"', b'"last":[],"last"')):
        assert refused(line.replace(old, new)).expected == "one value"
        assert read_entries([line.replace(old, new)], NOW) is None


def test_f08_an_escaped_backslash_before_u0000_is_text():
    assert parse_trace(toy(prompt="\\u0000")).prompt == "\\u0000"
    assert parse_trace(toy(prompt="😀")).prompt == "😀"


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("depth", [101, 990, 100_000])
def test_f10_deep_nesting_is_refused(opening: bytes, closing: bytes, depth: int):
    deep = opening * depth + b"1" + closing * depth
    assert "deep" in refused(toy(meta={"x": "DEEP"}).replace(b'"DEEP"', deep)).expected


@pytest.mark.parametrize("empty", [True, False])
def test_f10_the_bound_of_nesting_is_exact(empty: bool):
    for depth in range(MAX_DEPTH - 4, MAX_DEPTH + 2):
        line = toy(meta={"x": "DEEP"}).replace(b'"DEEP"', b"[" * depth + b"1" * (not empty) + b"]" * depth)
        if depth + 2 <= MAX_DEPTH:  # the record and its meta are two levels
            assert parse_trace(line) and read_strictly(line, Trace)
        if depth + 2 > MAX_DEPTH + empty:
            assert "deep" in refused(line).expected


def test_what_nests_deep_is_read_the_careful_way():
    for depth in range(10):
        line = toy(meta={"x": "DEEP"}).replace(b'"DEEP"', b'[{"y":' * depth + b"1" + b"}]" * depth)
        [entry] = read_entries([line], NOW) or [None]
        assert (entry is None) == (depth > 3)
        assert parse_trace(line).meta == json.loads(line)["meta"]


def test_f10_over_one_mebibyte_is_refused():
    long = [{"i": i, "type": "step", "content": "x" * 20_000} for i in range(60)]
    assert refused(toy(steps=long)).expected == "at most 1 MiB"
    assert refused(b"x" * (MAX_BYTES + 1)).expected == "at most 1 MiB"
    assert parse_trace(toy(steps=long[:50])).steps[49].i == 49


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"prompt": "x" * 50_001}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"final_answer": "x" * 50_001}, "final_answer"),
        ({"steps": []}, "steps"),
        ({"steps": [{"i": i, "type": "s", "content": "c"} for i in range(1001)]}, "steps"),
        ({"steps": [{"i": 0, "type": "x" * 65, "content": "c"}]}, "steps[0].type"),
        ({"steps": [{"i": 0, "type": "s", "content": "x" * 20_001}]}, "steps[0].content"),
        ({"steps": [{"i": i, "type": "s", "content": "c"} for i in (0, 4, 4)]}, "steps[2].i"),
        ({"trace_version": "x" * 65}, "trace_version"),
        ({"id": ""}, "id"),
        ({"id": "x" * 201}, "id"),
    ],
)
def test_bounds_are_kept(changes: dict, field: str):
    assert refused(toy(**changes)).field == field


def test_the_bounds_themselves_are_accepted():
    steps = [{"i": i, "type": "t" * 64, "content": "c"} for i in range(1000)]
    trace = parse_trace(toy(prompt="é" * 50_000, final_answer="x" * 50_000, steps=steps, id="x" * 200))
    assert len(trace.steps) == 1000


def test_what_is_shown_is_short_and_holds_no_control_character():
    for value in ("\x1b[31m\n", "\u202e" * 500, "x" * 10**6, {"a": 1}, 10**29, None, "é" * 79, "'\"" * 40):
        assert len(shown(value)) <= 80 and shown(value).isprintable()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from('ab":'), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)


@settings(max_examples=150)
@given(
    texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    texts,
    st.dictionaries(texts, json_values),
)
def test_f13_a_trace_written_and_read_is_the_same(prompt, steps, answer, meta):
    trace = make_trace(prompt, steps, answer, meta)
    again = parse_trace(to_json(trace))
    assert again == trace and content_sha256(again) == content_sha256(trace)


@settings(max_examples=150)
@given(texts, json_values, st.booleans(), st.sampled_from([None, 1]))
def test_the_quick_way_and_the_careful_way_agree(prompt, value, escape, indent):
    line = json.dumps(TOY | {"prompt": prompt, "meta": {"x": value}}, ensure_ascii=escape, indent=indent).encode()
    assert canonical(parse_trace(line)) == canonical(read_strictly(line, Trace))


pieces = st.sampled_from(
    [
        b'"',
        b"\\",
        b"{",
        b"}",
        b",",
        b":",
        b"0",
        b"-",
        b"e9",
        b"\xff",
        b"\n",
        b" ",
        b'"i":0,',
        b'"meta":{},',
        b'"a":1,',
        b"NaN,",
    ]
)


@settings(max_examples=400)
@given(texts, json_values, st.booleans(), st.lists(st.tuples(st.floats(0, 1), pieces), max_size=2), st.booleans())
def test_what_the_quick_way_takes_the_careful_way_takes_and_reads_the_same(prompt, value, escape, spoilt, whole):
    record = TOY | {"prompt": prompt, "meta": {"x": value}} | ({"id": "t", "created_at": NOW} if whole else {})
    line = json.dumps(record, ensure_ascii=escape).encode()
    for place, piece in spoilt:
        at = round(place * len(line))
        line = line[:at] + piece + line[at:]
    if entries := read_entries([line], NOW):
        careful = read_strictly(line, Trace)
        expected = to_entry(careful, NOW)
        [entry] = entries
        for name in ("id", "content_sha256", "created_at", "facts"):
            assert getattr(entry, name) == getattr(expected, name)
        assert parse_trace(entry.record.encode()) == parse_trace(expected.record.encode())


def test_one_line_in_doubt_keeps_all_from_the_quick_way():
    lines = [toy(prompt=str(n)) for n in range(50)]
    entries = read_entries(lines, NOW)
    assert [entry.id for entry in entries] == [parse_trace(line).id for line in lines]
    assert entries[7].record == f'{{"created_at":"{NOW}","id":"{entries[7].id}",{lines[7].decode()[1:]}'
    for doubtful in (b"{}", b"", b"[]", toy(late=1), toy(steps=[TOY["steps"][0]] * 2), toy(created_at="now")):
        assert read_entries([*lines[:20], doubtful, *lines[20:]], NOW) is None


def _without(record: dict, key: str) -> bytes:
    return json.dumps({name: value for name, value in record.items() if name != key}).encode()
