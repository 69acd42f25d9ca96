"""Run folders that the tests of the report share; read only."""

import pytest
from report_runs import make_course_run, make_our_run


@pytest.fixture(scope="session")
def our_run(tmp_path_factory):
    return make_our_run(tmp_path_factory.mktemp("logs") / "torch_conv_exp_2026-01-02_03-04-05")


@pytest.fixture(scope="session")
def course_run(tmp_path_factory):
    return make_course_run(tmp_path_factory.mktemp("course") / "CNN_exp_2024-10-11_12-13-14")
