"""The examples for foreign trainers, run to the end as a person would."""

import json
import shutil

import pytest
import torch
from forked import ROOT, fork_script
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory, tiny_tokenizer_path):
    """A directory with a tiny model and its tokenizer, and a file of conversations."""
    directory = tmp_path_factory.mktemp("example")
    shutil.copytree(tiny_tokenizer_path, directory / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=106, pad_token_id=0, **sizes)).save_pretrained(directory / "model")
    lines = []
    for number in range(40):
        turns = (
            {"role": "user", "content": f"what is {number} + 1"},
            {"role": "assistant", "content": f"{number + 1}"},
        )
        lines.append(json.dumps({"messages": turns}))
    (directory / "data.jsonl").write_text("\n".join(lines))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("script", ["trainer", "trainer_lora", "sft_trainer", "accelerate_loop"])
def test_an_example_trains_and_saves_a_stock_model(model_and_data, tmp_path, script):
    base, output = model_and_data / "model", tmp_path / "out"
    options = ["--model", base, "--data", model_and_data / "data.jsonl", "--output", output, "--max-steps", "2"]
    cpu = 'os.environ["ACCELERATE_USE_CPU"] = "true"'
    done = fork_script(tmp_path, ROOT / "tools" / "examples" / f"{script}.py", [*map(str, options)], cpu).wait()
    assert done.code == 0, done.stderr
    assert "loss" in done.stdout
    before = AutoModelForCausalLM.from_pretrained(base)
    name = "model.layers.1.mlp.up_proj.weight"
    if script == "trainer_lora":
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
        after = adapted.merge_and_unload()
    else:
        after = AutoModelForCausalLM.from_pretrained(output)
    assert not torch.equal(after.get_parameter(name), before.get_parameter(name))
    assert (
        "selective" not in (output / ("adapter_config.json" if script == "trainer_lora" else "config.json")).read_text()
    )
