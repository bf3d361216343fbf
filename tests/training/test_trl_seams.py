"""What rlseq relies on inside of TRL and transformers: an upgrade that moves it fails here, by name."""

import ast
import dataclasses
import importlib.metadata
import inspect
from pathlib import Path

import pytest
import trl
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraModel
from transformers import PreTrainedModel, Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import utils

import rlseq

LIMIT = 14
SEAMS = {  # overridden or called
    "_generate": ["prompts"],
    "_generate_single_turn": [
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_prepare_inputs": ["generation_batch"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "_save_checkpoint": ["model", "trial"],
}


def overridden(trainer):
    """The names of TRL's and transformers' trainers that rlseq's class gives another meaning."""
    own = [cls for cls in trainer.__mro__ if cls.__module__.startswith("rlseq.")]
    theirs = [cls for cls in trainer.__mro__ if cls not in (*own, object)]
    names = {name for cls in own for name in vars(cls) if name == "__init__" or not name.startswith("__")}
    return {name for name in names if any(name in vars(cls) for cls in theirs)}


def test_few_names_of_trl_are_overridden():
    assert len(overridden(rlseq.GRPOTrainer)) <= LIMIT
    assert len(overridden(rlseq.PPOTrainer) - overridden(rlseq.GRPOTrainer)) <= 4


FOREIGN = ("torch", "transformers", "trl", "peft", "accelerate")
METHODS = {
    name
    for cls in (trl.GRPOTrainer, trl.SFTTrainer, PreTrainedModel, PeftModel, Linear)
    for name in dir(cls)
    if callable(getattr(cls, name, None))
}


def replaced(source):
    """The methods and classes of other packages' objects that a source replaces, as it writes them."""
    tree = ast.parse(source)
    bound = set()  # names of other packages' modules and classes
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if (getattr(node, "module", None) or alias.name).split(".")[0] in FOREIGN:
                    bound.add(alias.asname or alias.name.split(".")[0])
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        attributes = [(one.value, one.attr) for one in targets if isinstance(one, ast.Attribute)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            attributes.append((node.args[0], getattr(node.args[1], "value", None)))
        for base, name in attributes:
            root = base
            while isinstance(root, ast.Attribute):
                root = root.value
            foreign = isinstance(root, ast.Name) and root.id in bound
            if foreign or (name in METHODS and ast.unparse(base) != "self"):
                found.append(f"{ast.unparse(base)}.{name}")
    return found


def test_nothing_of_another_package_is_replaced():
    root = Path(rlseq.__file__).parent
    found = {str(path.relative_to(root)): replaced(path.read_text()) for path in root.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "model.forward = forward",
        "setattr(self.model, 'forward', forward)",
        "layer.__class__ = Mine",
        "from trl import GRPOTrainer\nGRPOTrainer.limit = 3",
        "import trl.trainer.utils\ntrl.trainer.utils.x: int = 3",
    ],
)
def test_what_is_replaced_is_found(line):
    assert len(replaced(line)) == 1
    assert replaced("self.forward = 1\nlayer.groups = 2\nforward = 3") == []


def test_the_trainer_has_objects_in_place_of_layers():
    layers = [cls.__name__ for cls in rlseq.GRPOTrainer.__mro__[1:] if cls.__module__.startswith("rlseq.")]
    assert layers == ["RolloutTrainer", "RunMixin"]
    assert rlseq.PPOTrainer.__mro__[1] is rlseq.GRPOTrainer


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_version_is_the_one_that_was_read():
    assert importlib.metadata.version("trl").split(".")[:2] == ["1", "16"]


@pytest.mark.parametrize("name", list(SEAMS))
def test_a_method_has_the_parameters_relied_on(name):
    assert parameters(getattr(trl.GRPOTrainer, name)) == SEAMS[name]


def called_in(method):
    """The source of a method: whether a seam is still called from where its override expects to be called."""
    return inspect.getsource(getattr(trl.GRPOTrainer, method))


@pytest.mark.parametrize(
    ("caller", "callee"),
    [
        ("_prepare_inputs", "_generate_and_score_completions"),
        ("_prepare_inputs", "_buffered_inputs"),
        ("_generate", "_generate_single_turn"),
    ],
)
def test_a_seam_is_called_where_its_override_expects_it(caller, callee):
    assert f"self.{callee}" in called_in(caller)


@pytest.mark.parametrize("name", ["entropy_coef", "_last_world_entropy"])
def test_the_entropy_controller_is_saved_and_restored_by_trl(name):
    assert f"self.{name}" in called_in("_save_checkpoint") and f"self.{name} =" in called_in(
        "_load_optimizer_and_scheduler"
    )
    assert f"self.{name} =" in called_in("__init__") and "self._entropy_window_stats = None" in called_in("__init__")


def test_without_kl_no_reference_is_made_and_what_makes_one_stands_after_the_policy():
    made = called_in("__init__")
    without = made.index("if self.beta == 0.0:\n            # If beta is 0.0, the reference model is not needed")
    assert without < made.index("self.ref_model = create_model_from_path(")
    assert made.count("self.beta") == 3 and "if args.sync_ref_model:\n            if self.beta == 0.0:" in made
    # What happens to a reference beside, in this order; a dropout that is off is off in its copy.
    after = ("disable_dropout_in_model(self.ref_model)", "_cast_lm_head_to_fp32(self.ref_model)")
    after += ("add_fused_lm_head(\n                self.ref_model", "prepare_deepspeed(self.ref_model")
    assert [made.index(call) for call in after] == sorted(made.index(call) for call in after)


def test_environments_are_reset_by_row_and_looked_up_by_class():
    made, used = called_in("__init__"), called_in("_generate_and_score_completions")
    assert "environment_factory" in parameters(trl.GRPOTrainer.__init__)
    assert "inspect.getmembers(type(instance), predicate=inspect.isfunction)" in made
    assert "self.environments.append(pool[index])" in used and "environment.reset(**reset_kwargs)" in used
    assert 'if member_name not in ("reset", "get_reward") and not member_name.startswith("_")' in used
    # Its own reward is the last of TRL's lists, from which it is taken again.
    lists = ("reward_funcs", "reward_func_names", "reward_processing_classes")
    assert all(f"self.{name}.append(" in made for name in lists)
    assert "self.reward_weights = torch.cat([self.reward_weights, torch.ones(1)])" in made
    assert "self.async_loop" in made and "self.vllm_mode" in made
    # What TRL's method sets for its loop of tool calls, make_batch sets.
    assert "self._batch_environments = [" in used
    assert "self._sync_tool_dicts.append(" in used and "self._async_tool_dicts.append(" in used
    # A vLLM server samples a group from its first prompt.
    assert "all_prompts[::num_generations]" in inspect.getsource(VLLMGeneration.generate)


def test_turns_of_tools_come_with_a_mask():
    order = "prompt_ids, completion_ids, tool_mask, completions, logprobs"
    assert f"return {order}" in called_in("_generate")


def test_the_fused_head_returns_log_probs_in_place_of_logits():
    head = inspect.signature(utils.add_fused_lm_head).parameters
    assert list(head) == ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]
    fields = {field.name for field in dataclasses.fields(utils.FusedCausalLMOutput)}
    assert {"loss", "log_probs", "entropy", "label_mask"} <= fields


def test_peft_makes_the_layers_that_a_configuration_registers():
    # Documented, and called experimental: huggingface.co/docs/peft/developer_guides/custom_models
    assert parameters(LoraConfig._register_custom_module) == ["mapping"]
    source = inspect.getsource(LoraModel._create_new_module)
    assert "isinstance(target_base_layer, key)" in source and "if new_module is not None:" in source


def test_the_parser_adds_dataclasses_field_by_field():
    assert {"args", "fail_with_unknown_args"} <= set(parameters(trl.TrlParser.parse_args_and_config))
    assert parameters(trl.TrlParser._parse_dataclass_field) == ["parser", "field"]
    assert parameters(trl.TrlParser._add_dataclass_arguments) == ["dtype"]


def test_a_generation_batch_is_derived_and_may_not_be_given_twice():
    config = trl.GRPOConfig(output_dir="x", bf16=False, use_cpu=True)
    assert config.generation_batch_size == 8 and config.steps_per_generation == 1
    with pytest.raises(ValueError, match="can not be both configured"):
        trl.GRPOConfig(output_dir="x", bf16=False, use_cpu=True, generation_batch_size=8, steps_per_generation=1)


def test_an_epoch_is_one_method_that_a_finished_run_can_skip():
    assert "max_steps" not in inspect.getsource(Trainer._run_epoch).split("for update_step")[0]
    assert "self._run_epoch(" in inspect.getsource(Trainer._inner_training_loop)


def test_fsdp_and_deepspeed_load_a_checkpoint_in_one_method_before_which_its_names_are_checked():
    source = inspect.getsource(Trainer._prepare_for_training)
    assert "deepspeed_load_checkpoint(" in source and "self._load_from_checkpoint(" in source


@pytest.mark.parametrize("trainer", [trl.GRPOTrainer, trl.SFTTrainer])
def test_trls_card_is_written_before_a_checkpoint_is_saved_and_rlseqs_after(trainer):
    source = inspect.getsource(trainer._save_checkpoint)
    assert source.index("self.create_model_card(") < source.index("super()._save_checkpoint(")
    assert "self.callback_handler.on_save(" in inspect.getsource(Trainer._maybe_log_save_evaluate)


def test_a_push_saves_and_uploads_the_output_directory():
    for push in (Trainer.push_to_hub, Trainer._push_from_checkpoint):
        source = inspect.getsource(push)
        assert "self.args.output_dir" in source and "upload_folder(" in source
    assert parameters(Trainer.push_to_hub)[:2] == ["commit_message", "blocking"]
    assert parameters(Trainer.save_model) == ["output_dir", "_internal_call"]


def test_the_table_of_completions_is_printed_by_trl_unless_the_trainer_says_otherwise():
    assert "if self.accelerator.is_main_process and self.log_completions:" in called_in("log")
    printed = ["prompts", "completions", "rewards", "advantages", "step", "num_samples", "extra"]
    assert parameters(utils.print_prompt_completions_sample) == printed


def test_trackers_are_opened_again_as_they_were_opened():
    assert parameters(TensorBoardCallback._init_summary_writer) == ["args"]
    assert parameters(TrackioCallback.setup) == ["args", "state", "model", "kwargs"]
    opened = inspect.getsource(TrackioCallback.setup)
    assert "name=args.run_name" in opened and 'resume="allow"' in opened
