"""The cache of sparse targets: what comes back, how large it is, and what happens where it is not whole."""

from copy import copy

import pyarrow as pa
import pytest
import torch

from bridle.core.sparse import sparse_target
from bridle.core.tokens import pad_right
from bridle.data.target_cache import TargetCache, TargetWriter, bytes_per_token, row_keys
from bridle.errors import UserError
from reference_losses import log_buckets, sparse_kl_divergence

VOCABULARY, K = 50, 8
ROWS = [[5, 6, 7, 8, 9], [5, 6], [0, 0, 0], [7, 8, 9, 10]]


@pytest.fixture
def batch():
    """Keys of four rows, a mask [4, 4] that leaves out some prefixes, and log q of the others [9, vocabulary]."""
    ids, attention = pad_right(ROWS, pad=0)
    mask = attention[:, 1:].bool()
    mask[0, 0] = False  # as in a prompt
    return row_keys(ids, attention, mask), (3 * torch.randn(9, VOCABULARY)).log_softmax(-1), mask


def keys_of(rows, pad=0):
    ids, attention = pad_right(rows, pad)
    return row_keys(ids, attention, attention[:, 1:].bool())


def written(batch, path=None, k=K):
    keys, log_q, mask = batch
    writer = TargetWriter(path, k, VOCABULARY)
    writer.add(keys[:2], sparse_target(log_q[:4], k), mask[:2])
    writer.add(keys[2:], sparse_target(log_q[4:], k), mask[2:])
    return writer.close()


class TestKeys:
    def test_padding_changes_nothing(self):
        assert keys_of(ROWS) == keys_of(ROWS, pad=3) == [keys_of([row])[0] for row in ROWS]

    def test_rows_differ_also_where_tokens_equal_the_pad(self):
        assert len({*keys_of([[1], [1, 0], [1, 0, 0], [0, 1], [1, 2]])}) == 5

    def test_the_same_tokens_with_other_prefixes_are_another_row(self):
        ids, attention = pad_right([[5, 6, 7], [5, 6, 7]], 0)
        first, second = row_keys(ids, attention, torch.tensor([[True, True], [False, True]]))
        assert first != second

    def test_they_stay_the_same_between_runs(self):
        assert keys_of([[1, 2, 3]]) == [1377734274505840868]


class TestCache:
    @pytest.mark.parametrize("place", ["disk", "memory"])
    def test_gives_back_what_was_written(self, batch, tmp_path, place):
        keys, log_q, mask = batch
        cache = written(batch, tmp_path / "targets.arrow" if place == "disk" else None)
        target, found = sparse_target(log_q, K), cache.gather(keys, mask)
        assert torch.equal(found.indices, target.indices)
        torch.testing.assert_close(log_buckets(found), log_buckets(target), rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(log_buckets(found).exp().sum(-1), torch.ones(9))
        assert (cache.k, cache.vocabulary) == (K, VOCABULARY)
        assert len(cache) == 4

    def test_in_another_order_and_padding(self, batch):
        keys, _, mask = batch
        cache = written(batch)
        wide = torch.zeros(2, 9, dtype=torch.bool)
        wide[0, 2:5], wide[1, 6:] = True, True  # prefixes may lie elsewhere: their order counts
        found, plain = cache.gather([keys[3], keys[0]], wide), cache.gather(keys, mask)
        assert found.indices.shape == (6, K)
        assert torch.equal(found.log_probs[:3], plain.log_probs[6:])
        assert torch.equal(found.indices[3:], plain.indices[:3])

    def test_the_loss_is_that_of_the_targets(self, batch):
        keys, log_q, mask = batch
        logits, counted = torch.randn(9, VOCABULARY), torch.ones(9, dtype=torch.bool)
        total, count = sparse_kl_divergence(written(batch).gather(keys, mask), logits, counted)
        expected, expected_count = sparse_kl_divergence(sparse_target(log_q, K), logits, counted)
        torch.testing.assert_close(total, expected, rtol=2e-3, atol=0)
        assert count == expected_count

    @pytest.mark.parametrize("k", [1, VOCABULARY, VOCABULARY + 3])
    def test_the_smallest_and_the_largest_k(self, batch, k):
        keys, log_q, mask = batch
        found = written(batch, k=k).gather(keys, mask)
        torch.testing.assert_close(found.log_probs, sparse_target(log_q, k).log_probs, rtol=1e-3, atol=2e-3)

    def test_tokens_that_are_ruled_out_stay_so(self, batch):
        keys, log_q, mask = batch
        log_q = log_q.masked_fill(torch.arange(VOCABULARY) > 3, -torch.inf).log_softmax(-1)
        found = written((keys, log_q, mask)).gather(keys, mask)
        assert torch.equal(found.log_probs.exp().count_nonzero(-1), torch.full((int(mask.sum()),), 4))
        assert torch.equal(found.log_rest.exp(), torch.zeros(int(mask.sum())))

    @pytest.mark.parametrize(("vocabulary", "bytes_of_an_index"), [(2**16, 2), (2**16 + 1, 4)])
    def test_the_last_token_of_a_vocabulary_fits(self, vocabulary, bytes_of_an_index):
        target = sparse_target(torch.arange(vocabulary).float().log_softmax(-1)[None], 2)
        writer = TargetWriter(None, 2, vocabulary)
        writer.add([1], target, torch.ones(1, 1, dtype=torch.bool))
        found = writer.close().gather([1], torch.ones(1, 1, dtype=torch.bool))
        assert found.indices.tolist() == [[vocabulary - 1, vocabulary - 2]]
        assert bytes_per_token(2, vocabulary) == 2 * (bytes_of_an_index + 2) + 2

    def test_its_size_is_known_beforehand(self, tmp_path):
        rows, time, k = 200, 64, 32
        target = sparse_target(torch.randn(rows * time, VOCABULARY).log_softmax(-1), k)
        writer = TargetWriter(tmp_path / "targets.arrow", k, VOCABULARY)
        writer.add(range(rows), target, torch.ones(rows, time, dtype=torch.bool))
        writer.close()
        size = (tmp_path / "targets.arrow").stat().st_size
        assert size == pytest.approx(rows * time * bytes_per_token(k, VOCABULARY), rel=0.01)

    def test_ships_as_bytes(self, batch):
        keys, _, mask = batch
        cache = written(batch)
        shipped = TargetCache(cache.buffer.to_pybytes())
        assert torch.equal(*(log_buckets(one.gather(keys, mask)) for one in (shipped, cache)))
        assert shipped.vocabulary == VOCABULARY

    def test_between_processes_it_is_its_bytes_or_the_path_of_its_file(self, batch, tmp_path):
        keys, _, mask = batch
        for cache in (written(batch), written(batch, tmp_path / "targets.arrow")):
            shipped = copy(cache)  # by `__reduce__`, as a message is
            assert shipped is not cache
            assert torch.equal(*(log_buckets(one.gather(keys, mask)) for one in (shipped, cache)))
        assert cache.__reduce__()[1] == (tmp_path / "targets.arrow",)

    def test_a_file_is_mapped_and_not_read(self, batch, tmp_path):
        written(batch, tmp_path / "targets.arrow")
        before = pa.total_allocated_bytes()
        cache = TargetCache.open(tmp_path / "targets.arrow")
        assert cache.table.nbytes > 0
        assert pa.total_allocated_bytes() == before

    def test_knows_its_rows(self, batch):
        keys, *_ = batch
        cache = written(batch)
        assert all(key in cache for key in keys)
        assert max(keys) + 1 not in cache
        assert 0 not in cache

    def test_an_empty_cache(self):
        cache = TargetWriter(None, K, VOCABULARY).close()
        assert len(cache) == 0
        assert 7 not in cache


class TestWholeOrNotThere:
    def test_nothing_is_there_before_the_end(self, batch, tmp_path):
        keys, log_q, mask = batch
        with TargetWriter(tmp_path / "targets.arrow", K, VOCABULARY) as writer:
            writer.add(keys, sparse_target(log_q, K), mask)
            assert not (tmp_path / "targets.arrow").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["targets.arrow"]

    def test_a_failure_leaves_what_was_there(self, batch, tmp_path):
        written(batch, tmp_path / "targets.arrow")
        with pytest.raises(KeyboardInterrupt), TargetWriter(tmp_path / "targets.arrow", K, VOCABULARY):
            raise KeyboardInterrupt
        assert [path.name for path in tmp_path.iterdir()] == ["targets.arrow"]
        assert len(TargetCache.open(tmp_path / "targets.arrow")) == 4

    @pytest.mark.parametrize("place", ["disk", "memory"])
    def test_it_may_be_closed_inside_the_block(self, batch, tmp_path, place):
        keys, log_q, mask = batch
        with TargetWriter(tmp_path / "targets.arrow" if place == "disk" else None, K, VOCABULARY) as writer:
            writer.add(keys, sparse_target(log_q, K), mask)
            cache = writer.close()
        assert len(cache) == 4

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_a_cut_file_is_named(self, batch, tmp_path, share):
        path = tmp_path / "targets.arrow"
        whole = written(batch, path).buffer.to_pybytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=r"targets\.arrow: not a whole cache of targets .*; delete it$"):
            TargetCache.open(path)

    @pytest.mark.parametrize("content", ["text", "arrow"])
    def test_a_foreign_file_is_named(self, tmp_path, content):
        path = tmp_path / "targets.arrow"
        path.write_bytes(b"a shopping list\n" * 20)
        if content == "arrow":
            table = pa.table({"key": [1, 2]})
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        with pytest.raises(UserError, match=r"targets\.arrow: not a whole cache of targets"):
            TargetCache.open(path)

    def test_no_file_and_a_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.arrow: cannot be read \(.*No such file"):
            TargetCache.open(tmp_path / "none.arrow")
        with pytest.raises(UserError, match=r"cannot be read"):
            TargetCache.open(tmp_path)

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot be written"):
            TargetWriter(tmp_path / "file" / "targets.arrow", K, VOCABULARY)

    def test_rows_that_were_not_written_are_refused(self, batch):
        keys, _, mask = batch
        cache = written(batch)
        with pytest.raises(UserError, match="holds no target for a row of the batch"):
            cache.gather([keys[0], 12345], mask[:2])
        longer = torch.ones(1, 9, dtype=torch.bool)
        with pytest.raises(UserError, match="a row has 1 prefixes here and 9 in the batch"):
            cache.gather([keys[1]], longer)
