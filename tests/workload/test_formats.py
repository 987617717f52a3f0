"""Each format of traces, on a small file in its schema: plain, gzipped, told by content and by name."""

from __future__ import annotations

import datetime
import gzip
import json

import pytest
from files import (
    AZURE_2023,
    AZURE_2024,
    AZURE_LMM,
    BURSTGPT,
    BURSTGPT_OLD,
    CONVERSATIONS,
    DIFFUSIONDB,
    GUIDELLM,
    MOONCAKE,
    VIDUR,
    VLLM_OMNI,
    packed,
    put,
    taken,
    tokenizer,
)

from neustream import ConfigError
from neustream.workload import FORMATS, Row, Trace

EXPECTED = {
    "azure_llm": (AZURE_2023, [(0.0, 374, 44), (0.052, 396, 109), (0.0520001, 7, 1)]),
    "azure_lmm": (AZURE_LMM, [(0.0, 20, 7), (2.5, 900, 8)]),
    "burstgpt": (BURSTGPT, [(0.0, 472, 18), (41.0, 31, 7)]),
    "mooncake": (MOONCAKE, [(0.0, 700, 500), (0.482, 90, 490)]),
    "guidellm": (GUIDELLM, [(0.0, 700, 500), (27.25, 90, 490)]),
    "vidur": (VIDUR, [(0.0, 374, 44), (9.5, 396, 109)]),
}


def lengths(rows):
    return [(round(row.arrival_s, 9), row.prompt_tokens, row.output_tokens) for row in rows]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("way", [str.encode, packed], ids=["plain", "gzipped"])
def test_a_trace_of_a_language_model(tmp_path, name, way):
    content, expected = EXPECTED[name]
    path = put(tmp_path, way(content))
    for asked in ("auto", name):
        rows = taken(path, asked).rows
        assert lengths(rows) == expected
        assert Trace(path, asked).known_format() is FORMATS[name]


def test_azures_hundred_nanoseconds_are_kept(tmp_path):
    rows = taken(put(tmp_path, AZURE_2023)).rows
    assert [row.arrival_s for row in rows] == [0.0, 0.052, 0.0520001]


def test_azures_time_zones(tmp_path):
    rows = taken(put(tmp_path, AZURE_2024)).rows
    assert [row.arrival_s for row in rows] == pytest.approx([0.0, 0.007405, 0.99007])


def test_a_change_of_daylight_saving_is_no_jump_where_there_are_time_zones(tmp_path):
    lines = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2024-10-27 02:59:59+02:00,1,1",
        "2024-10-27 02:00:01+01:00,1,1",
    ]
    assert [row.arrival_s for row in taken(put(tmp_path, "\n".join(lines))).rows] == [0.0, 2.0]


def test_azures_images(tmp_path):
    assert [row.images for row in taken(put(tmp_path, AZURE_LMM)).rows] == [0, 3]


def test_burstgpt_skips_failed_calls_and_keeps_sessions(tmp_path):
    found = taken(put(tmp_path, BURSTGPT))
    assert [(row.session, row.model, row.line) for row in found.rows] == [("12", None, 2), (None, None, 4)]
    assert found.notes.lines() == [
        "1 row skipped: no output tokens: a failed call",
        "columns not used: 'Elapsed time', 'Log Type', 'Model', 'Total tokens'",
    ]


def test_burstgpt_without_sessions(tmp_path):
    found = taken(put(tmp_path, BURSTGPT_OLD))
    assert lengths(found.rows) == [(0.0, 472, 18), (113.0, 20, 9)]
    assert not found.notes.skipped


def test_mooncakes_blocks(tmp_path):
    assert [row.hash_ids for row in taken(put(tmp_path, MOONCAKE)).rows] == [(46, 47), (46,)]


def test_the_same_keys_are_seconds_in_guidellm_and_milliseconds_in_mooncake(tmp_path):
    path = put(tmp_path, GUIDELLM)
    assert taken(path).rows[1].arrival_s == 27.25
    assert taken(path, "mooncake").rows[1].arrival_s == 0.02725


@pytest.mark.parametrize("way", [str.encode, packed], ids=["plain", "gzipped"])
def test_vllm_omnis_requests(tmp_path, way):
    found = taken(put(tmp_path, way(VLLM_OMNI)))
    assert found.rows == [
        Row(0.0, 20, 512, 768, slo_s=0.8, params={"prompt": "a cat's hat", "seed": 3}, line=1),
        Row(0.75, 50, 1024, 1024, 81, params={"prompt": "a 'dog'"}, line=2),
    ]
    assert found.notes.lines() == ["columns not used: 'fps', 'image_paths', 'request_id'"]


def test_vllm_omnis_requests_are_never_evaluated(tmp_path):
    victim = tmp_path / "victim"
    for line in (
        f"Request(timestamp=open({str(victim)!r}, 'w').close())",
        f"Request(timestamp=[open({str(victim)!r}, 'w') for _ in [1]][0])",
        f"Request(open({str(victim)!r}, 'w'))",
        f"Request(**{{'timestamp': open({str(victim)!r}, 'w')}})",
    ):
        with pytest.raises(ConfigError, match=r"line 1: .*; allowed: Request"):
            taken(put(tmp_path, line))
    assert not victim.exists()


DRAWN = [
    Row(0.0, 50, 512, 704, params={"prompt": "a cat, sitting", "seed": 2615452550, "guidance_scale": 7.0}, line=2),
    Row(60.0, 25, 512, 512, params={"prompt": "a dog", "seed": 11, "guidance_scale": 12.5}, line=3),
]


@pytest.mark.parametrize("way", [str.encode, packed], ids=["plain", "gzipped"])
def test_diffusiondb_as_csv(tmp_path, way):
    assert taken(put(tmp_path, way(DIFFUSIONDB))).rows == DRAWN


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("unit", ["us", "ms", "ns"])
def test_diffusiondb_as_parquet(tmp_path, gzipped, unit):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    noon = datetime.datetime(2022, 8, 8, 15, 30, tzinfo=datetime.UTC)
    columns = {
        "image_name": ["a.png", "b.png", "c.png"],
        "prompt": ["a cat, sitting", "a dog", "nothing"],
        "seed": arrow.array([2615452550, 11, 12], arrow.uint32()),
        "step": arrow.array([50, 25, 0], arrow.uint16()),
        "cfg": arrow.array([7.0, 12.5, 1.0], arrow.float32()),
        "width": arrow.array([512, 512, 512], arrow.uint16()),
        "height": arrow.array([704, 512, 512], arrow.uint16()),
        "timestamp": arrow.array([noon, noon + datetime.timedelta(minutes=1), noon], arrow.timestamp(unit, "UTC")),
    }
    path = tmp_path / "metadata"
    parquet.write_table(arrow.table(columns), path)
    if gzipped:
        path = put(tmp_path, gzip.compress(path.read_bytes()), "packed")
    found = taken(path)
    assert found.rows == [row._replace(line=at) for at, row in enumerate(DRAWN, 1)]
    assert found.notes.skipped == {"no steps": 1}
    assert Trace(path).unit() == "row"


def test_sharegpt_has_lengths_by_a_tokenizer_and_no_arrivals(tmp_path):
    pytest.importorskip("tokenizers")
    words = tokenizer(tmp_path)
    for content in (
        json.dumps(CONVERSATIONS),
        json.dumps(CONVERSATIONS, indent=2),
        "\n".join(map(json.dumps, CONVERSATIONS)),
    ):
        for way in (str.encode, packed):
            found = taken(put(tmp_path, way(content)), tokenizer=words)
            assert [(row.prompt_tokens, row.output_tokens, row.session) for row in found.rows] == [
                (3, 2, "a"),
                (1, 4, "c"),
            ]
            assert not found.timed
            assert found.notes.skipped == {"no turn of a person with an answer": 1}
    assert taken(tmp_path / "trace", tokenizer=words, requests=1).rows[0].session == "a"


def test_sharegpt_without_a_tokenizer_is_told(tmp_path):
    path = put(tmp_path, json.dumps(CONVERSATIONS))
    with pytest.raises(ConfigError, match="sharegpt has texts and no lengths: name a tokenizer"):
        taken(path)
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match=r"no such file; allowed: a tokenizer.json"):
        taken(path, tokenizer=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"tokenizer .*trace: "):
        taken(path, tokenizer=path)
    with pytest.raises(ConfigError, match="has no arrivals: start_s, duration_s and speed do not go with it"):
        taken(path, tokenizer=tokenizer(tmp_path), speed=2.0)


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ({"conversations": 3}, "line 1: column 'conversations' is 3; allowed: a list of turns"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "allowed: objects as in"),
        ({"conversations": ["Hello", "you"]}, "a turn of 'conversations' is 'Hello'; allowed: objects as in"),
    ],
)
def test_conversations_that_are_none(tmp_path, conversations, message):
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError) as wrong:
        taken(put(tmp_path, json.dumps([conversations])), tokenizer=tokenizer(tmp_path))
    assert message in str(wrong.value)


def test_every_format_is_told_from_every_other(tmp_path):
    contents = {name: content for name, (content, _) in EXPECTED.items()}
    contents |= {"vllm_omni": VLLM_OMNI, "diffusiondb": DIFFUSIONDB, "sharegpt": json.dumps(CONVERSATIONS)}
    contents |= {"neustream": "arrival_s,steps\n0,3\n"}
    assert set(contents) == set(FORMATS)
    for name, content in contents.items():
        assert Trace(put(tmp_path, content, "no.suffix")).known_format().name == name
