"""Batch files: what becomes of each line, and of an output that is there already."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from servers import build
from tiny_tokenizer import EOS_TOKEN_ID, make_tokenizer

from hotset.cli import cli
from hotset.engine.service import EngineService
from hotset.errors import ConfigError
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.server.admission import Admission, Admitted
from hotset.server.batch_file import Batch
from hotset.server.batch_identity import RunIdentity, line_identity, read_record_id
from hotset.server.batches import BatchRunner
from hotset.server.files import FileStore
from hotset.server.keys import Tenant
from hotset.server.limits import UNLIMITED
from hotset.server.schemas import BatchRequest, GenerationRequest
from hotset.text.prompt import PromptEncoder


@pytest.fixture(scope="module")
def service() -> Iterator[EngineService]:
    service = EngineService(Options.of(hot_gib=0.01), build=build)
    yield service
    service.close()


def write_batch(path: Path) -> None:
    body = {"prompt": "the cat", "max_tokens": 3, "temperature": 0}
    lines = [
        json.dumps({"custom_id": str(i), "url": "/v1/completions", "body": body}) for i in range(6)
    ]
    lines[2] = "not json"
    lines[4] = lines[0]  # its custom_id again
    path.write_text("\n".join(lines))


def outcome(path: Path) -> list[tuple[Any, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["custom_id"], r["response"] and r["response"]["body"]["choices"]) for r in records]


def test_a_batch_cut_at_any_byte_goes_on_to_the_same_output(
    service: EngineService, tmp_path: Path
) -> None:
    source, whole, torn = tmp_path / "in", tmp_path / "whole", tmp_path / "torn"
    write_batch(source)
    batch = Batch(source, whole)
    summary = batch.run(service, window=2)
    batch.close()
    assert (summary.lines, summary.errors) == (6, 2)
    expected = outcome(whole)
    assert [custom_id for custom_id, _ in expected] == ["0", "1", None, "3", "0", "5"]

    content = whole.read_bytes()
    for end in range(0, len(content) + 1, max(1, len(content) // 7)):
        torn.write_bytes(content[:end])
        batch = Batch(source, torn)
        batch.run(service, window=3)
        batch.close()
        assert outcome(torn) == expected


def test_an_output_of_another_input_is_refused_and_left_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    others = ('{"custom_id": "other"}\n', "my notes\nand more\n", "my notes\n", "my notes")
    for content in others:
        target.write_text(content)
        with pytest.raises(ConfigError, match="choose another output"):
            Batch(source, target)
        assert target.read_text() == content
    with pytest.raises(ConfigError, match="both input and output"):
        Batch(source, source)
    with pytest.raises(ConfigError, match="/dev/full is not a plain file"):
        Batch(source, Path("/dev/full"))


DEEP_LINE = '{"custom_id": "deep", "url": "/v1/completions", "body": ' + "[" * 100_000


def test_a_line_that_cannot_be_parsed_costs_the_others_nothing(
    service: EngineService, tmp_path: Path
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    lines = source.read_bytes().splitlines()
    lines[1], lines[3] = DEEP_LINE.encode(), b'{"custom_id": "\xff"}'
    source.write_bytes(b"\n".join(lines))
    batch = Batch(source, target)
    summary = batch.run(service, window=4)
    batch.close()

    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert (summary.lines, summary.errors) == (6, 4)
    assert [bool(record["response"]) for record in records] == [True, *[False] * 4, True]
    assert records[1]["error"] == {
        "code": "invalid_json",
        "message": "the line is nested too deeply: more than 200 levels",
    }
    assert "is not UTF-8" in records[3]["error"]["message"]


def test_a_bug_that_one_line_shows_is_that_lines_error(
    service: EngineService, tmp_path: Path
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    admission = Admission(service, PromptEncoder(service.model), UNLIMITED)
    calls = iter(range(10))

    def submit(request: GenerationRequest) -> Admitted:
        if next(calls) == 1:
            raise IndexError("a bug")
        return admission.submit(request, Tenant(), is_batch=True)

    batch = Batch(source, target)
    summary = batch.run(service, window=2, submit=submit)
    batch.close()
    assert (summary.lines, summary.errors) == (6, 3)
    assert json.loads(target.read_text().splitlines()[1])["response"]["status_code"] == 500


def test_half_a_character_in_a_line_costs_the_others_nothing(
    service: EngineService, tmp_path: Path
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    lines = source.read_text().splitlines()
    lines[1] = lines[1].replace('"1"', '"\\ud800"')
    source.write_text("\n".join(lines))
    for _ in range(2):  # the second finds all lines there
        batch = Batch(source, target)
        batch.run(service, window=4)
        batch.close()
    assert [i for i, _ in outcome(target)] == ["0", "\ud800", None, "3", "0", "5"]


def answer_first(source: Path, target: Path, service: EngineService, num_lines: int) -> bytes:
    """An output with the first lines answered; returns its content."""
    batch = Batch(source, target)
    batch.run(service, window=1)
    batch.close()
    content = b"".join(target.read_bytes().splitlines(keepends=True)[:num_lines])
    target.write_bytes(content)
    return content


EDITS: dict[str, Any] = {
    "prompt": "a dog",
    "max_tokens": 4,
    "temperature": 1,
    "seed": 3,
    "model": "another",
    "stop": ["x"],
}


@pytest.mark.parametrize("field", EDITS)
def test_an_edited_input_is_refused_by_the_line(
    service: EngineService, tmp_path: Path, field: str
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    content = answer_first(source, target, service, 3)
    lines = source.read_text().splitlines()
    entry = json.loads(lines[1])
    entry["body"][field] = EDITS[field]
    source.write_text("\n".join([lines[0], json.dumps(entry), *lines[2:]]))
    with pytest.raises(
        ConfigError, match=r"line 2 answers another request.*custom_id '1'"
    ) as error:
        Batch(source, target)
    assert "the input was edited; undo that, or delete it" in str(error.value)
    assert target.read_bytes() == content


def test_a_line_that_was_mended_is_refused_too(service: EngineService, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    answer_first(source, target, service, 3)
    source.write_text(source.read_text().replace("not json", "{not json}"))
    with pytest.raises(ConfigError, match="line 3 answers another request"):
        Batch(source, target)


def test_lines_written_another_way_are_the_same(service: EngineService, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    whole = outcome_of_run(source, tmp_path / "whole", service)
    answer_first(source, target, service, 3)
    lines = source.read_text().splitlines()
    for i in (0, 1, 3, 4, 5):
        entry = json.loads(lines[i])
        entry["body"] = dict(reversed(entry["body"].items()))
        lines[i] = json.dumps(dict(reversed(entry.items())), indent=None, separators=(" ,", ": "))
    source.write_text("\r\n\n".join(lines) + "\n")
    assert outcome_of_run(source, target, service) == whole


def test_another_order_of_a_schemas_properties_is_another_request() -> None:
    def line(*names: str) -> bytes:
        schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        entry = {"custom_id": "1", "url": "/v1/chat/completions"}
        return json.dumps({**entry, "body": {"messages": [], "response_format": form}}).encode()

    assert line_identity(line("a", "b")) == line_identity(line("a", "b") + b" ")
    assert line_identity(line("a", "b")) != line_identity(line("b", "a"))


def outcome_of_run(source: Path, target: Path, service: EngineService) -> Any:
    batch = Batch(source, target)
    batch.run(service, window=2)
    batch.close()
    return outcome(target)


def test_answers_of_another_model_or_other_options_are_refused(
    service: EngineService, tmp_path: Path
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    content = answer_first(source, target, service, 3)
    config = service.options
    other = replace(service.model, fingerprint="other")
    batch = Batch(source, target)
    batch.check_run(RunIdentity.of("tiny", config))
    batch.check_run(RunIdentity.of_model(service.model, config))
    another_template = replace(RunIdentity.of_model(service.model, config), texts="0" * 8)
    with pytest.raises(
        ConfigError, match="answers under another chat template or tokenizer; undo its change"
    ):
        batch.run(service, window=1, identity=another_template)
    batch.check_run(RunIdentity.of("tiny", config.but(host_gib=1.0, max_num_seqs=3)))
    with pytest.raises(ConfigError, match="holds answers of another model"):
        batch.run(service, window=1, identity=RunIdentity.of_model(other, config))
    for changed in (
        {"seed": 1},
        {"kv_dtype": "fp8"},
        {"dtype": "bfloat16"},
        {"json_max_digits": 3},
    ):
        with pytest.raises(ConfigError, match="other values of options that change answers"):
            batch.check_run(RunIdentity.of("tiny", config.but(**changed)))
    batch.close()
    lines = content.splitlines()
    target.write_bytes(lines[0] + b"\n" + lines[1].replace(b"_1_", b"_7_", 1) + b"\n")
    with pytest.raises(ConfigError, match="does not tell what it answers"):
        Batch(source, target)


def test_records_keep_the_form_of_openais(service: EngineService, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    outcome_of_run(source, target, service)
    lines = source.read_bytes().splitlines()
    for position, record in enumerate(map(json.loads, target.read_text().splitlines())):
        assert record.keys() == {"id", "custom_id", "response", "error"}
        expected = RunIdentity.of_model(service.model, service.options)
        assert read_record_id(record["id"]) == (
            position,
            line_identity(lines[position]),
            expected,
        )


def test_the_command_looks_at_the_model_before_it_loads_one(
    service: EngineService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every line is answered already."""
    source, target = tmp_path / "in", tmp_path / "out"
    write_batch(source)
    outcome_of_run(source, target, service)
    fingerprint = "tiny"
    monkeypatch.setattr("hotset.model.loader.fingerprint_of", lambda *_, **__: fingerprint)
    result = CliRunner().invoke(cli, ["batch", str(source), str(target)])
    assert result.exit_code == 0 and "6 of 6 lines are there already" in result.output
    fingerprint = "other"
    result = CliRunner().invoke(cli, ["batch", str(source), str(target)])
    assert isinstance(result.exception, ConfigError)
    assert "holds answers of another model" in str(result.exception)


def test_a_server_with_another_model_does_not_go_on_with_a_batch(
    service: EngineService, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    write_batch(source)
    admission = Admission(service, PromptEncoder(service.model), UNLIMITED)
    store = FileStore(tmp_path / "files", max_tenant_bytes=2**20)

    async def main() -> Any:
        runner = BatchRunner(store, admission)
        with source.open("rb") as content:
            file = store.add("", content, filename="in", purpose="batch")
        request = BatchRequest(input_file_id=file["id"], endpoint="/v1/completions")
        entry = runner.create("", request)  # its task has not begun
        output = store.data_path("", entry["id"].replace("batch-", "file-"))
        batch = Batch(source, output)
        other = replace(service.model, fingerprint="other")
        batch.run(service, window=1, identity=RunIdentity.of_model(other, service.options))
        batch.close()
        await asyncio.gather(*runner._tasks)
        return store.get("", entry["id"])

    entry = asyncio.run(main())
    assert entry["status"] == "failed"
    [error] = entry["errors"]["data"]
    assert error["message"] == (
        "the output so far holds answers of another model; give that one, or create the batch again"
    )


def test_an_edited_tokenizer_and_other_end_tokens_are_another_model_to_a_batch() -> None:
    config = Options.of()
    loaded = LoadedModel(None, make_tokenizer(), "tiny", "0" * 32, (EOS_TOKEN_ID,), 64)
    identity = RunIdentity.of_model(loaded, config)
    assert RunIdentity.of_model(replace(loaded, tokenizer=make_tokenizer()), config) == identity
    edited = make_tokenizer()
    edited.add_tokens(["colour"])
    for other in (replace(loaded, tokenizer=edited), replace(loaded, eos_token_ids=(1,))):
        assert RunIdentity.of_model(other, config).texts != identity.texts
