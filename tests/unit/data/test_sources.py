"""What the words of --data_path and --image_folder mean."""

import pytest

from dc_megatron.config import DataSource
from dc_megatron.data.sources import read_sources
from dc_megatron.errors import UserError


def test_files_and_weights():
    assert read_sources(["a.json"], ["i"]) == (DataSource("a.json", "i"),)
    assert read_sources(["a.json:1.0", "b.json:0.5"], ["i"]) == (
        DataSource("a.json", "i", 1.0),
        DataSource("b.json", "i", 0.5),
    )
    assert read_sources(["a:b.json", "c:2"], ["i", "j"]) == (DataSource("a:b.json", "i"), DataSource("c", "j", 2.0))
    assert read_sources(["a.json"], []) == (DataSource("a.json", "."),)


def test_yaml(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text("datasets:\n- data_path: a.json\n  image_folder: i\n- {data_path: b.json, weight: 0.5}\n")
    assert read_sources([str(path)], ["j"]) == (DataSource("a.json", "i"), DataSource("b.json", "j", 0.5))


@pytest.mark.parametrize(
    ("paths", "folders", "words"),
    [
        (["a:0"], [], "weight 0.0: must be a number above 0"),
        (["a:-1"], [], "must be a number above 0"),
        (["a:nan"], [], "must be a number above 0"),
        (["a", "b", "c"], ["i", "j"], "2 folders for 3 files"),
        (["a.yaml", "b"], [], "give one YAML file alone"),
        (["missing.yaml"], [], "no such file"),
    ],
)
def test_refused(paths, folders, words):
    with pytest.raises(UserError, match=words):
        read_sources(paths, folders)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "not readable as YAML"),
        ("- a", "must hold a list 'datasets'"),
        ("datasets: []", "must hold a list 'datasets'"),
        ("datasets: [3]", "entry 0 is a int"),
        ("datasets: [{path: a}]", "unknown key 'path'.*did you mean 'data_path'"),
        ("datasets: [{image_folder: a}]", "data_path None: must be text"),
        ("datasets: [{data_path: a, weight: much}]", "weight much"),
        ("datasets: [{data_path: a, weight: true}]", "weight True"),
    ],
)
def test_refused_yaml(tmp_path, content, words):
    path = tmp_path / "mix.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_sources([str(path)], [])
