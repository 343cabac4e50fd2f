"""Reading: what comes out of good files, and what is said about bad ones."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from fedtrio.data.load import Corpus, DataConfig, Rows, load_corpus
from fedtrio.data.read import is_file, read_file
from fedtrio.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data sets are not at {SHARED}")


@pytest.fixture
def write(tmp_path):
    """Write a file into the configuration's folder; a list becomes JSON lines."""

    def write(name: str, content: str | bytes | list) -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def load(tmp_path):
    def load(task="classification", **fields) -> Corpus:
        return load_corpus(DataConfig(**fields), task, tmp_path)

    return load


def csv_of(n: int, classes: int = 2, columns: str = "text,label") -> str:
    return f"{columns}\n" + "".join(f"text {i},{i % classes}\n" for i in range(n))


SPLIT = {"test": 0.2, "public": 0.1}


class TestSplit:
    def test_sizes_and_disjoint(self, write, load):
        write("train.csv", csv_of(100))
        corpus = load(train="train.csv")
        assert [len(r) for r in (corpus.train, corpus.test, corpus.public)] == [70, 20, 10]
        together = corpus.train.prompts + corpus.test.prompts + corpus.public.prompts
        assert sorted(together) == sorted(f"text {i}" for i in range(100))
        assert corpus.public.labels is None
        assert corpus.warnings == ()

    def test_the_same_every_time_and_in_the_file_s_order(self, write, load):
        write("train.csv", csv_of(100))
        corpus = load(train="train.csv")
        assert load(train="train.csv").test.prompts == corpus.test.prompts
        for rows in (corpus.train, corpus.test, corpus.public):
            numbers = [int(text.split()[1]) for text in rows.prompts]
            assert numbers == sorted(numbers)

    def test_labels_stay_with_their_texts(self, write, load):
        write("train.csv", csv_of(100, classes=7))
        corpus = load(train="train.csv")
        for rows in (corpus.train, corpus.test):
            assert [int(text.split()[1]) % 7 for text in rows.prompts] == rows.labels.tolist()

    def test_files_for_all_three(self, write, load):
        write("train.csv", csv_of(10))
        write("test.csv", "text,label\nnew,1\n")
        write("public.csv", "text\nfree\n")
        corpus = load(train="train.csv", test="test.csv", public="public.csv")
        assert [len(r) for r in (corpus.train, corpus.test, corpus.public)] == [10, 1, 1]
        assert corpus.test.labels.tolist() == [1]

    def test_public_texts_of_several_files(self, write, load):
        """Equal parts, as far as a file has them; a path that is absolute stays one in a resolved configuration."""
        for name, n in (("in", 6), ("off", 4), ("few", 1)):
            write(f"{name}.csv", "text\n" + "".join(f"{name} {i}\n" for i in range(n)))
        write("train.csv", "text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(10)))
        sources = {"train": "train.csv", "public": ["in.csv", "off.csv", "few.csv"]}
        assert len(load(**sources).public) == 11
        mixed = load(**sources, max_public=7).public.prompts
        assert Counter(text.split()[0] for text in mixed) == {"in": 2, "off": 2, "few": 1}
        assert load(**{**sources, "public": ["in.csv"]}).public == load(**{**sources, "public": "in.csv"}).public
        with pytest.raises(ValueError, match="names no public texts"):
            DataConfig(public=[])

    def test_subsets_keep_order(self, write, load):
        write("train.csv", csv_of(100))
        corpus = load(train="train.csv", max_train=5, max_test=3, max_public=1)
        assert [len(r) for r in (corpus.train, corpus.test, corpus.public)] == [5, 3, 1]
        whole = load(train="train.csv").train.prompts
        positions = [whole.index(text) for text in corpus.train.prompts]
        assert positions == sorted(positions)

    def test_too_few_rows(self, write, load):
        write("train.csv", csv_of(2))
        with pytest.raises(DataError, match="2 rows are too few to hold out 2"):
            load(train="train.csv")


class TestConfig:
    def test_fractions(self):
        for wrong in (0, 1, 1.5, -0.1, "2"):
            with pytest.raises(ValidationError, match="must lie between 0 and 1"):
                DataConfig(test=wrong)
        with pytest.raises(ValidationError, match="leave nothing to train on"):
            DataConfig(test=0.6, public=0.4)
        assert DataConfig(test="0.25").test == 0.25
        assert DataConfig(test="validation").test == "validation"

    def test_unknown_key(self):
        with pytest.raises(ValidationError, match="extra"):
            DataConfig(trian="x.csv")  # type: ignore[call-arg]

    def test_a_written_configuration_reads_back(self):
        config = DataConfig()
        assert DataConfig(**config.model_dump()) == config


class TestLabels:
    def test_integers_sort_as_numbers(self, write, load):
        write("train.csv", "text,label\n" + "".join(f"t{i},{i}\n" for i in (10, 9, 2, 100)) * 3)
        assert load(train="train.csv").labels == ("2", "9", "10", "100")

    def test_strings_sort_as_words_and_stay_as_written(self, write, load):
        write("train.csv", "text,label\n" + "a,nan\nb,null\nc,True\nd,01\n" * 3)
        assert load(train="train.csv").labels == ("01", "True", "nan", "null")

    def test_float_integers_are_integers(self, write, load):
        write("train.csv", "text,label\n" + "a,3.0\nb,3\nc,4.0\n" * 3)
        write("test.jsonl", [{"text": "x", "label": 4.0}, {"text": "y", "label": 3}])
        corpus = load(train="train.csv", test="test.jsonl")
        assert corpus.labels == ("3", "4")
        assert corpus.test.labels.tolist() == [1, 0]
        assert corpus.test.labels.dtype == np.int64

    def test_mixed_types_in_json(self, write, load):
        write(
            "train.jsonl",
            [{"text": "a", "label": 1}, {"text": 5, "label": "x"}, {"text": "c", "label": True}] * 3,
        )
        corpus = load(train="train.jsonl", test="train.jsonl", public="train.jsonl")
        assert corpus.labels == ("1", "True", "x")
        assert corpus.train.prompts[:3] == ["a", "5", "c"]
        write("train.jsonl", [{"text": "a", "label": [1]}])
        with pytest.raises(DataError, match="a list or an object in column 'label' in row 1"):
            load(train="train.jsonl")

    def test_one_class(self, write, load):
        write("train.csv", csv_of(20, classes=1))
        with pytest.raises(DataError, match=r"only one class \(0\)"):
            load(train="train.csv")

    def test_unseen_in_training(self, write, load):
        write("train.csv", csv_of(20))
        write("test.csv", "text,label\na,0\nb,loan\nc,loan\nd,fee\n")
        with pytest.raises(DataError, match=r"test\.csv: labels that .*: 'loan' \(2 rows\), 'fee' \(1 row\)$"):
            load(train="train.csv", test="test.csv")

    def test_missing(self, write, load):
        write("train.csv", "text,label\na,0\nb,\nc,1\nd, \ne\n")
        with pytest.raises(DataError, match=r"no value in column 'label' in 3 rows: 2, 4, 5"):
            load(train="train.csv")
        write("train.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": None}])
        with pytest.raises(DataError, match=r"no value in column 'label' in row 2"):
            load(train="train.jsonl")

    def test_sites(self, write, load):
        write("train.csv", "text,label,bank\n" + "a,0,bern\nb,1,lyon\n" * 10)
        corpus = load(train="train.csv", site="bank")
        assert {(t, s) for t, s in zip(corpus.train.prompts, corpus.train.sites, strict=True)} == {
            ("a", "bern"),
            ("b", "lyon"),
        }
        assert corpus.public.sites is None
        write("test.csv", "text,label\nc,0\n")
        assert load(train="train.csv", site="bank", test="test.csv").test.sites is None
        write("train.csv", "text,label,bank\na,0,\nb,1,lyon\n")
        with pytest.raises(DataError, match="no value in column 'bank' in row 1"):
            load(train="train.csv", site="bank")


class TestTexts:
    def test_empty_ones_are_dropped_and_counted(self, write, load):
        write("train.csv", csv_of(20) + " ,\n,1\n")
        corpus = load(train="train.csv")
        assert len(corpus.train) + len(corpus.test) + len(corpus.public) == 20
        assert "dropped 2 of 22 rows" in corpus.warnings[0]

    def test_all_empty(self, write, load):
        write("train.csv", "text,label\n,1\n ,0\n")
        with pytest.raises(DataError, match="all 2 texts are empty"):
            load(train="train.csv")

    def test_overlaps_are_counted(self, write, load):
        write("train.csv", csv_of(20))
        write("test.csv", "text,label\ntext 3,1\ntext 4,0\nnew,0\n")
        write("public.csv", "text\ntext 5\nnew\nnew\n")
        assert load(train="train.csv", test="test.csv", public="public.csv").warnings == (
            "2 of 3 test texts also occur in the training set",
            "1 of 3 public texts also occur in the training set",
            "2 of 3 public texts also occur in the test set",
        )

    def test_quotes_commas_and_newlines(self, write, load):
        write("train.csv", 'text,label\n"a, ""b""\nc",0\nd,1\n' * 1 + "e,1\n" * 3)
        corpus = load(train="train.csv", test="train.csv", public="train.csv")
        assert corpus.train.prompts == ['a, "b"\nc', "d", "e", "e", "e"]


class TestFiles:
    def test_byte_order_mark(self, write, load):
        write("train.csv", b"\xef\xbb\xbf" + csv_of(20).encode())
        write("test.jsonl", b"\xef\xbb\xbf" + b'{"text": "a", "label": 1}\n')
        write("public.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
        corpus = load(train="train.csv", test="test.jsonl", public="public.txt")
        assert corpus.test.prompts == ["a"]
        assert corpus.public.prompts == ["one", "two"]

    def test_parquet_and_json_and_tsv(self, write, tmp_path):
        from datasets import Dataset

        columns = {"text": ["a", "b"], "label": [1, 2]}
        Dataset.from_dict(columns).to_parquet(tmp_path / "x.parquet")
        write("x.json", json.dumps([{"text": "a", "label": 1}, {"text": "b", "label": 2}]))
        write("x.tsv", "text\tlabel\na\t1\nb\t2\n")
        assert read_file(tmp_path / "x.parquet").columns == columns
        assert read_file(tmp_path / "x.json").columns == columns
        assert read_file(tmp_path / "x.tsv").columns == {"text": ["a", "b"], "label": ["1", "2"]}

    def test_a_nameless_index_column_does_no_harm(self, write, load):
        write("train.csv", ",text,label\n" + "".join(f"{i},t{i},{i % 2}\n" for i in range(20)))
        assert load(train="train.csv").labels == ("0", "1")

    def test_missing_file(self, write, load):
        write("train.csv", csv_of(20))
        with pytest.raises(DataError, match=r"trian\.csv: no such file; did you mean 'train\.csv'\?"):
            load(train="trian.csv")
        with pytest.raises(DataError, match=r"nowhere does not exist either"):
            load(train="nowhere/train.csv")
        with pytest.raises(DataError, match=r"tets\.csv: no such file"):
            load(train="train.csv", test="tets.csv")

    def test_a_folder_and_an_unknown_kind(self, write, load, tmp_path):
        (tmp_path / "folder").mkdir()
        write("train.xlsx", "x")
        with pytest.raises(DataError, match="is a folder; name a file in it"):
            load(train="folder")
        with pytest.raises(DataError, match=r"unknown kind of file '\.xlsx'; known: \.csv"):
            load(train="train.xlsx")

    def test_missing_column(self, write, load):
        write("train.csv", csv_of(20, columns="txt,label"))
        with pytest.raises(DataError, match=r"no column 'text'; found: txt, label; did you mean 'txt'\?"):
            load(train="train.csv")

    @pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
    @pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.txt"])
    def test_empty_file(self, write, load, name, content):
        write(name, content)
        with pytest.raises(DataError, match="the file is empty"):
            load(train=name)

    def test_header_only(self, write, load):
        write("train.csv", "text,label\n")
        with pytest.raises(DataError, match=r"no rows, only a header \(text, label\)"):
            load(train="train.csv")

        write("train.json", "[]")
        with pytest.raises(DataError, match=r"no rows$"):
            load(train="train.json")

    def test_not_utf8(self, write, load):
        write("train.csv", "text,label\nok,1\ncafé,0\n".encode("latin-1"))
        with pytest.raises(DataError, match=r"line 3: byte 0xe9 \(offset 19\) is not UTF-8"):
            load(train="train.csv")

    def test_ragged_and_doubled(self, write, load):
        write("train.csv", "text,label\na,1\nb,2,3\n")
        with pytest.raises(DataError, match=r"line 3 has 3 values for 2 columns; a text with ','"):
            load(train="train.csv")
        write("train.csv", 'text,label\na,1\n"b,2\n')
        with pytest.raises(DataError, match=r"line 3 is not CSV: unexpected end of data"):
            load(train="train.csv")
        write("train.csv", "text,text\na,1\n")
        with pytest.raises(DataError, match="names 'text' twice"):
            load(train="train.csv")

    def test_broken_json(self, write, load):
        write("train.jsonl", '{"text": "a", "label": 1}\n{"text": \n')
        with pytest.raises(DataError, match=r"line 2, column 10 is not JSON"):
            load(train="train.jsonl")
        write("train.jsonl", "{}\n[1]\n")
        with pytest.raises(DataError, match=r"row 2 is of type int, not an object"):
            load(train="train.jsonl")
        write("train.parquet", "not parquet")
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            load(train="train.parquet")

    @pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet"])
    def test_nothing_is_sent_or_left_behind(self, write, load, tmp_path, monkeypatch, name):
        import datasets

        rows = [{"text": f"text {i}", "label": str(i % 2)} for i in range(20)]
        write("train.csv", csv_of(20))
        write("train.jsonl", rows)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
        before = sorted(tmp_path.iterdir())
        sent = []
        monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: sent.append(where))
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        load(train=name)
        assert sent == []
        assert sorted(tmp_path.iterdir()) == before


def chat(*turns: str) -> dict:
    return {"messages": [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns]}


class TestCausalLM:
    def load(self, load, name: str = "train.jsonl", **fields) -> Rows:
        return load("causal-lm", train=name, test=name, public=name, **fields).train

    def test_text(self, write, load):
        write("train.txt", "one\n\n two \nthree")
        rows = self.load(load, "train.txt")
        assert (rows.prompts, rows.completions, rows.labels) == (["one", " two ", "three"], None, None)

    def test_prompt_and_completion(self, write, load):
        write("train.jsonl", [{"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": ""}])
        rows = self.load(load, prompt="question", completion="answer")
        assert (rows.prompts, rows.completions) == (["1+1"], ["2"])

    def test_messages(self, write, load):
        turns = ["system:be kind", "user:hi", "assistant:hello", "user:bye", "assistant:ciao", "user:?"]
        write("train.jsonl", [chat(*turns), chat("assistant:first"), chat("user:no answer")])
        rows = self.load(load)
        assert rows.prompts == ["system: be kind\nuser: hi\nassistant: hello\nuser: bye\n", ""]
        assert rows.completions == ["ciao", "first"]

    def test_bad_messages(self, write, load):
        write("train.jsonl", [{"messages": "hello"}])
        with pytest.raises(DataError, match=r"row 1: a chat is a list of \{role, content\} in text, got 'hello'"):
            self.load(load)

    def test_messages_of_several_kinds_stay_apart(self, write, load):
        tool = {"role": "assistant", "content": None, "tool_calls": [1]}
        write("train.jsonl", [{"messages": [tool, *chat("tool:7", "assistant:seven")["messages"]]}])
        rows = self.load(load)
        assert (rows.prompts, rows.completions) == (["assistant: \ntool: 7\n"], ["seven"])
        write("train.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}])
        with pytest.raises(DataError, match="row 1: a chat is a list of"):
            self.load(load)

    def test_labels_serve_the_partition(self, write, load):
        write("train.csv", "text,topic\n" + "a,x\nb,y\n" * 5)
        corpus = load("causal-lm", train="train.csv", label="topic")
        assert corpus.labels == ("x", "y")
        assert corpus.train.labels is not None
        assert load("causal-lm", train="train.csv").labels == ()

    def test_missing_columns(self, write, load):
        write("train.jsonl", [{"question": "1+1", "answer": "2"}])
        with pytest.raises(DataError, match=r"neither 'messages', nor 'prompt' with 'completion', nor 'text'.*quest"):
            self.load(load)
        with pytest.raises(DataError, match="no column 'anwser'; found: question, answer; did you mean 'answer'"):
            self.load(load, prompt="question", completion="anwser")


class TestHub:
    def test_what_is_a_file(self, tmp_path):
        (tmp_path / "plain").touch()
        assert all(is_file(s, tmp_path) for s in ("a.csv", "plain", "/x/y/z", "data/a.JSONL", "../up"))
        assert not any(is_file(s, tmp_path) for s in ("imdb", "org/name", "org/name:config", "org/v1.0"))

    @pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
    def test_out_of_reach(self, load, monkeypatch, offline):
        import datasets.config
        import huggingface_hub

        def no_network(*_, **__):
            raise OSError("Name or service not known")

        places = (huggingface_hub.constants, datasets.config)
        for place in places:
            monkeypatch.setattr(place, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("socket.getaddrinfo", no_network)
        start = time.monotonic()
        with pytest.raises(DataError, match=r"Hub dataset 'no/such:thing', split 'train': .*\n.*name a local CSV"):
            load(train="no/such:thing")
        assert time.monotonic() - start < 10
        assert [place.HF_HUB_OFFLINE for place in places] == [offline] * 2  # as it was

    def test_columns_splits_and_class_names(self, load, monkeypatch):
        import datasets
        import huggingface_hub

        asked = []

        def load_dataset(name, config, split):
            asked.append((name, config, split))
            features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
            rows = {"text": [f"{split} {i}" for i in range(20)], "label": [0, 1] * 10}
            return datasets.Dataset.from_dict(rows, features=features)

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        corpus = load(train="org/name:en", test="validation")
        assert asked == [("org/name", "en", "train"), ("org/name", "en", "validation")]
        assert corpus.labels == ("no", "yes")
        assert [len(r) for r in (corpus.train, corpus.test, corpus.public)] == [18, 20, 2]


class TestKnownData:
    def test_demo(self, tmp_path):
        corpus = load_corpus(DataConfig(), "classification", tmp_path)
        again = load_corpus(DataConfig(**DataConfig().model_dump()), "classification", tmp_path)
        assert corpus.test.prompts == again.test.prompts
        assert len(set(corpus.train.sites)) > 1
        assert set(corpus.test.labels) == set(range(len(corpus.labels)))
        assert min(len(corpus.test), len(corpus.public)) > 100
        held_out = load_corpus(DataConfig(test=0.3), "classification", tmp_path)
        assert len(held_out.train) + len(held_out.test) == len(corpus.train)

    @needs_shared
    def test_banking77(self):
        config = DataConfig(train="train.csv", test="test.csv", public="test.csv")
        corpus = load_corpus(config, "classification", SHARED / "banking77")
        assert (len(corpus.train), len(corpus.test), len(corpus.labels)) == (10_003, 3_080, 77)
        assert corpus.labels == tuple(map(str, range(77)))
        assert corpus.warnings[0] == "7 of 3080 test texts also occur in the training set"
        assert set(Counter(corpus.test.labels.tolist()).values()) == {40}
        by_name = load_corpus(config.model_copy(update={"label": "category"}), "classification", SHARED / "banking77")
        assert by_name.labels == tuple(json.loads((SHARED / "banking77" / "labels.json").read_text()))
        assert np.array_equal(by_name.train.labels, corpus.train.labels)

    @needs_shared
    def test_gsm8k(self):
        config = DataConfig(train="train.jsonl", test="test.jsonl", prompt="question", completion="answer")
        corpus = load_corpus(config, "causal-lm", SHARED / "gsm8k")
        assert (len(corpus.train) + len(corpus.public), len(corpus.test)) == (7_473, 1_319)
        assert corpus.test.completions[0].endswith("#### 18")
