"""NF4 layers and 8-bit AdamW where parameters are DTensors of two processes."""

import pytest
import quantized_shards
import several_ranks


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    several_ranks.run(2, tmp_path, quantized_shards.main)
