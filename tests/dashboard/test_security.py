"""What a stranger can send, and where it is shown that it does no harm.

`PROVEN` is the list: each claim with the tests that show it, wherever they live; the tests here are those that belong
to no other part of the house.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.evaluate_tools import write_task
from helpers.make_runs import make_run
from helpers.tiny_run import tiny_spec

from gptailor.dashboard import home, readers, run_table
from gptailor.errors import UserError
from gptailor.runfile import MAX_BYTES
from gptailor.store import queries
from gptailor.store.folder import run_folders
from gptailor.store.imports import MAX_ZIP, import_run
from gptailor.store.notes import Notes, read_notes, write_notes
from gptailor.store.sharing import copy_run, export_tables

ROOT = Path(__file__).resolve().parents[2]

PROVEN: dict[str, dict[str, list[str]]] = {
    "No path leaves the runs folder": {
        "run ids": ["test_store.test_other_ids_are_refused", "test_access.test_a_link_asks_for_nothing"],
        "links and devices in a run's folder": ["test_store.test_links_and_devices_are_refused"],
        "names in zips": ["test_store_sharing.test_a_hostile_zip_is_refused"],
        "names of jobs": ["test_launch.test_a_job_runs_once_and_is_missed_when_killed"],
        "links to pages": ["test_pages_analysis.test_a_made_up_run_in_the_url_is_told"],
        "weights named by an index": ["test_family.test_an_index_may_not_leave_its_folder"],
        "folders of other people": ["test_huggingface.test_folders_of_others_are_left_alone"],
    },
    "Text stays text": {
        "on pages": ["test_wording.test_safe_text_escapes_all_punctuation",
                     "test_browser_runs.test_other_peoples_text_is_shown_as_text"],
        "in reports": ["test_report.test_nothing_of_the_run_becomes_markup"],
        "in model cards": ["test_huggingface.test_what_others_wrote_stays_text"],
        "in CSV": ["test_store_sharing.test_no_cell_is_a_formula", "test_wording.test_cells_are_not_formulas",
                   "test_security.test_no_cell_of_the_table_of_runs_is_a_formula"],
        "in SQL": ["test_security.test_quotes_in_names_and_folders_are_letters"],
        "in the audit log": ["test_access.test_no_value_forges_a_line"],
    },
    "Sizes are capped before anything is parsed": {
        "uploads": ["test_serving.test_an_upload_that_nobody_waits_for_is_not_read",
                    "test_security.test_uploads_have_one_limit"],
        "zips and bombs": ["test_store_sharing.test_a_zip_that_lies_about_its_sizes",
                           "test_security.test_a_file_of_five_gigabytes_is_refused_unread"],
        "run files": ["test_security.test_a_run_file_of_many_lines_is_refused_unread"],
    },
    "Imported databases are data": {
        "views, macros, types, defaults": ["test_store_sharing.test_a_hostile_database_is_refused"],
        "what is in them": ["test_store_sharing.test_what_is_imported_is_made_harmless"],
    },
    "Model folders bring no code": {
        "remote code and kernels": ["test_family.test_remote_code_needs_permission",
                                    "test_family.test_kernels_from_the_hub_are_remote_code_too"],
        "never from the browser": ["test_security.test_the_browser_cannot_ask_for_code"],
        "pickles": ["test_family.test_pickles_are_refused_even_with_permission"],
        "chat templates": ["test_security.test_a_chat_template_reaches_nothing"],
        "task files": ["test_benchmarks.test_task_files_that_run_code_are_refused",
                       "test_benchmarks.test_pickled_data_is_refused",
                       "test_benchmarks.test_templates_are_rendered_in_a_sandbox"],
    },
    "Who may do what is decided in the action": {
        "roles": ["test_access.test_every_action_asks_by_itself",
                  "test_access.test_rights_lost_since_the_page_was_drawn_are_lost"],
        "one door": ["test_access.test_nothing_but_the_door_changes_anything"],
        "at a real provider": ["test_sign_in.test_a_viewer_looks_and_cannot_launch",
                               "test_sign_in.test_somebody_else_is_refused"],
        "secrets": ["test_launch.test_the_engine_gets_none_of_the_servers_secrets",
                    "test_launch.test_the_engine_gets_a_token_only_by_name"],
    },
    "Nothing leaves the machine": {
        "pages": ["test_browser_runs.test_every_page_by_its_link"],
        "the server": ["test_security.test_the_server_keeps_to_this_machine_and_tells_nobody",
                       "test_serving.test_a_socket_is_closed_to_strangers"],
        "searches": ["test_security.test_a_search_needs_no_network"],
        "packages with known vulnerabilities": ["test_audit.test_a_known_vulnerability_fails"],
    },
}  # fmt: skip


@pytest.mark.parametrize("claim", PROVEN)
def test_each_claim_has_its_tests(claim: str) -> None:
    for named in (name for names in PROVEN[claim].values() for name in names):
        module, _, test = named.partition(".")
        (path,) = (ROOT / "tests").rglob(f"{module}.py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, named


# --- text and sizes ---------------------------------------------------------------------------------------------------


def test_quotes_in_names_and_folders_are_letters(tmp_path: Path) -> None:
    nasty = "o'hara\"; DROP TABLE runs; --"
    root = tmp_path / nasty / "runs"
    folder = make_run(root, nasty, n_trials=4, benchmarks=(nasty, "piqa"), base_model=nasty)
    write_notes(folder, Notes(nasty, nasty, (nasty[:40],)))
    archive = copy_run(folder, tmp_path / nasty / f"{nasty}.zip")
    back = import_run(archive, root)
    assert back != folder and read_notes(back).name == nasty
    for run in (folder, back):
        tables = queries.read_run(run)
        assert tables.runs["name"].tolist() == [nasty] and nasty in set(tables.scores["benchmark"])
    export_tables(back, tmp_path / nasty / "tables", "csv")
    assert nasty in (tmp_path / nasty / "tables" / "scores.csv").read_text().replace('""', '"')


def test_no_cell_of_the_table_of_runs_is_a_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTAILOR_RUNS", str(tmp_path))
    monkeypatch.setattr(readers, "DEMO", tmp_path / "demo")
    folder = make_run(tmp_path, "=cmd()", n_trials=4)
    write_notes(folder, Notes("=cmd()", "", ("+1", "@x")))
    runs = readers.runs()
    table = run_table.listing(runs, home.saved_notes(runs))
    assert table["name"].tolist() == ["'=cmd()"] and table["tags"].tolist() == [["'+1", "'@x"]]


def test_uploads_have_one_limit() -> None:
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert config["server"]["maxUploadSize"] == home.MAX_UPLOAD_MB <= MAX_ZIP // 1024**2


def test_the_server_keeps_to_this_machine_and_tells_nobody() -> None:
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert config["server"]["address"] == "127.0.0.1" and config["browser"]["gatherUsageStats"] is False
    assert config["browser"]["serverAddress"] == "localhost"  # else it asks a host elsewhere for its own address
    assert not {"enableXsrfProtection", "enableCORS", "enableAgentApi", "trustedUserHeaders"} & config["server"].keys()


def test_a_file_of_five_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    archive = tmp_path / "large.zip"
    archive.touch()
    os.truncate(archive, 5 * 1024**3)
    with pytest.raises(UserError, match=r"5\.37 GB; at most 0\.27 GB"):
        import_run(archive, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_run_file_of_many_lines_is_refused_unread(tmp_path: Path) -> None:
    from gptailor.spec.files import load_spec

    lines = tmp_path / "long.yaml"
    lines.write_text("a: &a [x]\n" + "b: [*a, *a, *a, *a, *a, *a, *a]\n" * 10_000)
    assert lines.stat().st_size > MAX_BYTES
    with pytest.raises(UserError, match="larger than 262 kB"):
        load_spec(lines)


# --- code -------------------------------------------------------------------------------------------------------------


def test_the_browser_cannot_ask_for_code(tiny_family: Path) -> None:
    from gptailor.dashboard import form

    asked = tiny_spec(tiny_family, trust_remote_code=True)
    values = form.values_of(asked)
    made = form.draft(values | {"trust_remote_code": True, "name": "x\ntrust_remote_code: true"}, asked)
    assert made.spec is None or made.spec.trust_remote_code is False
    plain = form.draft(values, asked).spec
    assert plain is not None and plain.trust_remote_code is False


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch TOUCHED') }}",
    "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
    "{% for a in range(10 ** 9) %}x{% endfor %}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_reaches_nothing(tiny_family: Path, tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    from gptailor.evaluate.examples import chat_renderer

    shutil.copytree(tiny_family / "base", tmp_path / "base")
    touched = tmp_path / "touched"
    (tmp_path / "base" / "chat_template.jinja").write_text(template.replace("TOUCHED", str(touched)))
    render = chat_renderer(AutoTokenizer.from_pretrained(tmp_path / "base"))
    with pytest.raises((UserError, OverflowError), match=r"cannot be rendered|[Rr]ange too big"):
        render([{"role": "user", "content": "hello"}])
    assert not touched.exists()


# --- the network ------------------------------------------------------------------------------------------------------


def _without_network() -> bool:
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(["unshare", "-rn", "true"], capture_output=True, timeout=20).returncode
    )


@pytest.mark.slow
@pytest.mark.skipif(not _without_network(), reason="this machine lets nobody make a network of their own (unshare -rn)")
def test_a_search_needs_no_network(tiny_family: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "words")
    spec = tiny_spec(tiny_family, include_path=[str(tmp_path / "tasks")], output_scale=None, trials=2)
    (tmp_path / "run.yaml").write_text(spec.to_yaml())
    runs = str(tmp_path / "runs")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "http", "HTTP"))}

    def alone(*arguments: str) -> str:
        command = ["unshare", "-rn", sys.executable, "-m", "gptailor", *arguments, "--runs", runs]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    alone("search", str(tmp_path / "run.yaml"))
    [folder] = run_folders(tmp_path / "runs")
    assert json.loads(alone("show", folder.run_id, "--json"))["status"] == "finished"
    alone("report", folder.run_id, "--out", str(tmp_path / "report.html"))
    assert "What it proves" in (tmp_path / "report.html").read_text()
