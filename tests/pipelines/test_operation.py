from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.base.errors import UserError
from pipelines.config import operation, params

ROOT = Path(__file__).parents[2]


def write(folder: Path, **changes: object) -> Path:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump({"operation": changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": {"cron": "0 3 * *"}}, "operation.schedule.cron is '0 3 * *'; expected five fields"),
        ({"schedule": {"cron": "every night"}}, "expected five fields"),
        ({"schedule": {"cron": "60 3 * * *"}}, "its minute is '60'; expected"),
        ({"schedule": {"cron": "0 3 0 * *"}}, "its day is '0'"),
        ({"schedule": {"cron": "0 3 * foo *"}}, "its month is 'foo'"),
        ({"schedule": {"cron": "0 5-3 * * *"}}, "its hour is '5-3'"),
        ({"schedule": {"cron": "*/0 3 * * *"}}, "its minute is '*/0'"),
        (
            {"schedule": {"timezone": "Europe/Nowhere"}},
            "timezone is 'Europe/Nowhere'; expected a name",
        ),
        ({"schedule": {"timezone": ""}}, "expected a name of the IANA list"),
        ({"schedule": {"crn": "0 3 * * *"}}, "operation.schedule.crn is not a known key"),
        ({"workers": 0}, "operation.workers is 0"),
        ({"gpus": []}, "operation.gpus is []"),
        ({"gpus": [0, 0]}, "expected every device once"),
        ({"gpus": [-1]}, "operation.gpus"),
        ({"cluster": "slurm"}, "operation.cluster is 'slurm'; expected dask, ray"),
        ({"cluster": "tcp://host"}, "expected dask, ray"),
        ({"timeout_hours": 0}, "operation.timeout_hours is 0"),
        ({"notify": ["json://host/path"]}, "operation.notify"),
        ({"notify": "NAME"}, "operation.notify"),
    ],
    ids=str,
)
def test_a_mistake_is_a_sentence_that_names_the_key(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        operation.read(write(tmp_path, **changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cron", ["0 3 * * *", "*/15 * * * *", "0 0,12 1-15/2 jan-mar mon,Fri", "5 4 * * 7"])
def test_usual_cron_expressions_are_accepted(tmp_path: Path, cron: str) -> None:
    assert operation.read(write(tmp_path, schedule={"cron": cron})).schedule.cron == cron


def test_the_section_can_be_read_beside_a_mistake_in_another_one(tmp_path: Path) -> None:
    path = write(tmp_path, notify=["WHOM"])
    assert operation.read(path).notify == ("WHOM",)
    with pytest.raises(UserError):
        params.load(path)
    path.write_text("seed: 0\n")
    assert operation.read(path) == operation.Operation()


def test_the_defaults_of_the_project_are_those_of_the_schema() -> None:
    assert params.load(ROOT / "params.yaml").operation == operation.Operation()
