"""Configs: every field with its default, and how a bad one is refused before anything heavy is imported.

A config file is Python with `get_config(argument=None) -> ConfigDict`; it starts from `pretrain_config`,
`linear_config` or `finetune_config` here and sets what differs. Fields bear the names of the arguments that they
become. A value used twice is a reference and a rule is arithmetic on references, so that overrides on the command line
propagate. Only `train.py` reads a config; nothing below it has seen one.
"""

import importlib.util
import json
from collections.abc import Iterator

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from simmim_jax.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Fields that may change between two runs of one workdir, because no parameter depends on them.
FREE = (
    "data.workers", "data.threads", "data.prefetch", "data.on_error", "data.max_bad_fraction", "mesh.",
    "data.source", "data.path", "data.name", "data.data_dir", "classes",  # which images, their fingerprint tells
    "log_every", "save_every", "max_to_keep", "keep_period", "max_nonfinite_steps", "eval", "data.crop_fraction",
    "online_probes", "probe_block", "encoder.size", "imported.",
    "encoder.remat", "encoder.scan", "encoder.attention", "check_memory", "profile_steps",
    "microbatches",
    "objective.mask_token_truncation",  # which runs had before the encoder's init_truncation said it
)  # fmt: skip


BEFORE = {  # what runs did of which config.json does not tell, as they began before these fields
    "data.augment": "", "data.color_jitter": 0.0, "objective.mixup": 0.0, "objective.cutmix": 0.0,
    "objective.mixup_group": 0, "objective.reprob": 0.0, "objective.pool": "patches", "optim.frozen_layers": 0,
}  # fmt: skip


def base_config() -> ConfigDict:
    """What every run has."""
    c = ConfigDict()
    c.seed = 0
    c.epochs = 100.0  # length of the run; an epoch is images // batch_size steps
    c.steps = 0  # length of the run in steps instead, if above 0
    c.batch_size = 2048  # global: of all devices and processes together
    c.microbatches = 1  # parts of a batch, worked off one after another: the same update, unless batch norm sees parts
    c.init_from = ""  # workdir, or step folder in it, of which to take parameters
    c.init_parts = ()  # which: of encoder, mask_token, head; empty: all after the same objective, else the encoder
    c.image_size = (224, 224)  # height, width in pixels
    c.mean, c.std = IMAGENET_MEAN, IMAGENET_STD  # per channel on the scale 0..1; their length is the number of channels

    # How many ways devices split the batch (data, fsdp), parameters and moments (fsdp), heads and hidden units
    # (tensor); -1: the rest of them. fsdp=-1: parameters and moments over all devices.
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    c.check_memory = True  # refuse a run that the compiled step needs more memory for than a device has

    c.data = ConfigDict()
    c.data.source = "auto"  # what path and name say; or digits, folder, list, tar, parquet, array_record, tfds
    c.data.path = ""  # a folder of images, prepared shards, a list file, tar or Parquet files: data/sources/__init__.py
    c.data.name, c.data.data_dir = "", ""  # of a TFDS dataset; data_dir: TFDS's, or where a list's paths begin
    c.data.split = "train"
    c.data.heldout_split = "validation"
    c.data.heldout_fraction = 0.02  # of a folder that has no held-out part of its own
    c.data.image_size = c.get_ref("image_size")
    c.data.crop_scale, c.data.crop_ratio = (0.67, 1.0), (3 / 4, 4 / 3)
    c.data.flip = 0.5
    c.data.interpolation = "bilinear"
    c.data.augment = ""  # timm's RandAugment by its string, like rand-m9-mstd0.5-inc1
    c.data.color_jitter = 0.0  # strength of random brightness, contrast and saturation; with RandAugment: of t3a alone
    c.data.crop_fraction = 1.0  # of an evaluated image's resized side, that its center crop keeps: 0.875 is 224 of 256
    c.data.workers = -1  # processes that decode; 0: none but this; -1: beside an accelerator one a core, else 0
    c.data.threads, c.data.prefetch = 2, 4  # of each process: batches at work at a time, and waiting
    c.data.on_error = "replace"  # a bad image is replaced by another; or "raise": it stops the run
    c.data.max_bad_fraction = 0.01  # of all images; beyond it the run stops
    c.data.max_pixels = 64_000_000

    c.encoder = encoder_config("vit", "b")

    c.optim = ConfigDict()
    c.optim.name = "adamw"
    c.optim.schedule = "cosine"
    c.base_learning_rate = 1e-4  # for a batch of 512; the rule is linear in the batch (official main_simmim.py)
    c.optim.learning_rate = c.get_ref("base_learning_rate") * c.get_ref("batch_size") / 512
    c.optim.warmup_epochs = 10.0
    c.optim.warmup_learning_rate = FieldReference(5e-7) * c.get_ref("batch_size") / 512
    c.optim.min_learning_rate = FieldReference(1e-5) * c.get_ref("batch_size") / 512
    c.optim.milestones, c.optim.gamma = (), 0.1  # epochs, factor at each: of the multistep schedule
    c.optim.lr_step_offset = 0  # 1: each step uses the rate of the one before, as official code does
    c.optim.betas, c.optim.epsilon = (0.9, 0.999), 1e-8
    c.optim.weight_decay = 0.05
    c.optim.decay_mask_token, c.optim.decay_bias_tables = placeholder(bool), placeholder(bool)  # None: as official code
    c.optim.layer_decay = 1.0  # factor on the peak rate from each layer to the one before
    c.optim.grad_clip_norm = 5.0  # of the gradient's global norm; 0: not
    c.ema_decay = 0.0  # above 0, like 0.9999: an average of the parameters is kept, evaluated and handed on
    c.optim.frozen = ""  # regular expression of parameter paths that are not trained
    c.optim.frozen_layers = 0  # nor so many of the encoder's lowest layers: 1 what embeds, n that and n - 1 blocks

    c.evals = ConfigDict()  # by evaluator: its options
    c.eval_every = 0  # steps; 0: at the start and the end alone; -1: so often that it takes less than 3 % of the work
    c.eval_images = 2000  # held-out images, and as many training images for probes; 0: all
    c.eval_batch_size = c.get_ref("batch_size") // c.get_ref("microbatches")  # what fits in training fits here
    c.online_probes = False  # knn and linear among the evaluators, with their defaults, where the images have classes
    c.probe_block = 0  # whose output knn and linear probe read: 1 to depth, or 0 for the features

    c.log_every = 10
    c.save_every = 1000  # steps
    c.max_to_keep, c.keep_period = 2, 0  # checkpoints: the newest, and all whose step is a multiple (0: none)
    c.profile_steps = ()  # first and last step, like 20,25: of these a trace is written, for TensorBoard's profiler
    c.max_nonfinite_steps = 3  # steps in a row with a loss or gradient that is not finite, before the run stops
    return c


def encoder_config(name: str, size: str) -> ConfigDict:
    """The fields of every encoder; those that are None are what its class and its size in `SIZES` have.

    A field that the encoder of this name does not have must stay None. An empty name: the encoder of the run that
    `init_from` names, with what is set here changed.
    """
    c = ConfigDict({"name": name, "size": size})
    for field in ("width", "depth", "patch_size", "window"):
        c[field] = placeholder(int)
    for field in (
        "widths",
        "depths",
        "num_heads",
        "pretrained_windows",
    ):  # one value per stage; num_heads of a ViT: one
        c[field] = placeholder(tuple)
    for field in ("class_token", "patch_norm", "final_norm", "scan"):
        c[field] = placeholder(bool)
    for field in ("absolute_position", "relative_position", "qkv_bias", "dtype", "remat", "attention"):
        c[field] = placeholder(str)
    for field in ("mlp_ratio", "layer_scale", "drop_path", "norm_epsilon", "norm_momentum", "init_truncation"):
        c[field] = placeholder(float)
    return c


def pretrain_config() -> ConfigDict:
    """SimMIM pretraining: blocks of 32 pixels, ratio 0.6, held-out loss and pictures."""
    c = base_config()
    c.objective = ConfigDict({"name": "simmim", "mask": "random", "mask_patch_size": 32, "mask_ratio": 0.6})
    c.objective.norm_window = 0  # side in pixels of the windows that normalize the target; 0: it is not
    c.evals.reconstruction = ConfigDict({"pictures": 8})
    c.online_probes, c.eval_every = True, -1
    return c


def _classification() -> ConfigDict:
    """What linear evaluation and fine-tuning share: official crops, and the accuracy on all held-out images."""
    c = base_config()
    c.data.crop_scale = (0.08, 1.0)
    c.data.crop_fraction = 0.875
    c.data.interpolation = "bicubic"
    c.eval_images = 0
    c.evals.accuracy = ConfigDict({})
    return c


def linear_config() -> ConfigDict:
    """Linear evaluation: a frozen encoder, and a linear classifier on the mean patch feature of one block."""
    c = _classification()
    c.objective = ConfigDict({"name": "classify", "num_classes": 1000, "block": 8, "fc_norm": True})
    c.objective.pool = "patches"  # what is classified: or "class_token", "both"
    c.objective.head_init_scale, c.objective.label_smoothing = 0.001, 0.0
    c.objective.train_encoder = False
    c.optim.frozen = "encoder/"
    c.optim.weight_decay = 0.0
    c.optim.warmup_epochs = 0.0
    c.optim.min_learning_rate = 0.0
    return c


def finetune_config() -> ConfigDict:
    """Fine-tuning of the encoder of another run, whichever that is, as official SimMIM fine-tunes a Swin.

    Rates, decay, schedule, head, augmentation and mixing are those of its config.py, main_finetune.py and
    data_finetune.py. (Its color jitter of 0.4 is not used there: timm leaves it out where RandAugment is.)
    """
    c = _classification()
    c.data.augment = "rand-m9-mstd0.5-inc1"
    c.encoder = encoder_config("", "")
    c.encoder.drop_path = 0.1
    c.objective = ConfigDict({"name": "classify", "num_classes": 1000, "block": 0, "pool": "patches"})
    c.objective.fc_norm = placeholder(bool)  # None: where the encoder does not end in a norm
    c.objective.head_init_scale, c.objective.label_smoothing = 1.0, 0.1
    c.objective.train_encoder = True
    c.objective.mixup, c.objective.cutmix = 0.8, 1.0  # of Beta(a, a), whose draw is the share of the image; 0: none
    c.objective.mixup_prob, c.objective.mixup_switch_prob = 1.0, 0.5  # that a batch is mixed; that CutMix does it
    c.objective.mixup_mode = "batch"  # one draw for a batch; or "pair", "elem"
    c.objective.mixup_group = 0  # so many neighbors are mixed with one another, by a draw of theirs; 0: the batch
    c.objective.reprob = 0.25  # probability that boxes of an image become noise
    c.objective.remode, c.objective.recount = "pixel", 1  # or "rand", "const"; boxes at most
    c.epochs = 100.0
    c.base_learning_rate = 1.25e-3
    c.optim.schedule = "cosine_global"
    c.optim.lr_step_offset = 1
    c.optim.warmup_epochs = 20.0
    c.optim.warmup_learning_rate = FieldReference(2.5e-7) * c.get_ref("batch_size") / 512
    c.optim.min_learning_rate = FieldReference(2.5e-7) * c.get_ref("batch_size") / 512
    c.optim.layer_decay = 0.8
    return c


def segment_config(head: str = "linear") -> ConfigDict:
    """Semantic segmentation with the encoder of another run: `linear`, frozen under a linear map, or `upernet`.

    Crops, schedule and decay are those of BEiT's UPerNet on ADE20K (microsoft/unilm, beit/semantic_segmentation).
    """
    c = base_config()
    c.encoder = encoder_config("", "")
    c.objective = ConfigDict({"name": "segment", "num_classes": 150, "head": head, "block": 0, "blocks": ()})
    c.objective.channels, c.objective.auxiliary_weight = 512, 0.4  # of upernet alone
    c.objective.train_encoder = head != "linear"
    c.image_size = (512, 512)  # of the crops, and of the windows that whole images are evaluated by
    c.batch_size = 16
    c.data.maps = ConfigDict({"reduce_zero_label": False, "ignore": 255, "channel": -1})
    c.data.maps.short_side = 0  # to which images are scaled, in pixels; 0: the crop's shorter side; -1: they are not
    c.data.maps.scale, c.data.maps.most_of_one, c.data.maps.photometric = (0.5, 2.0), 0.75, True
    c.data.heldout_fraction = 0.1
    c.eval_images = 0
    c.evals.segmentation = ConfigDict({"pictures": 8, "step": 0})
    c.optim.schedule = "linear"
    c.optim.min_learning_rate = 0.0
    if head == "linear":
        c.optim.frozen = "encoder/"
        c.optim.weight_decay = 0.0
        c.base_learning_rate = 3.2e-2  # 1e-3 for a batch of 16
        c.optim.warmup_epochs = 0.0
        c.optim.warmup_learning_rate = 0.0
    else:
        c.encoder.drop_path = 0.1
        c.base_learning_rate = 3.2e-3  # 1e-4 for a batch of 16
        c.optim.warmup_epochs = 1.0
        c.optim.warmup_learning_rate = 0.0
        c.optim.layer_decay = 0.75
    c.log_every = 50
    return c


def to_dict(config: ConfigDict) -> dict:
    """The config as plain JSON data, references resolved: what config.json holds."""
    return json.loads(config.copy_and_resolve_references().to_json())


def refuse_change(saved: dict, now: dict, where: str) -> None:
    """Raise ConfigError, naming what differs, if the config `now` would not continue the run of `saved`.

    Both as config.json has them. What an imported model does not say is free; what a run does not, is as it was before
    there was such a field.
    """
    now, before = dict(flat(now)), dict(flat(saved))
    if "imported" not in saved:
        before = {name: value for name, value in BEFORE.items() if name in now} | before
    changed = [name for name in sorted(before) if now.get(name) != before[name] and not name.startswith(FREE)]
    if changed:
        examples = ", ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"workdir of another config ({examples}{more})", where, "undo the change, or give a new --workdir"
        )


def flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def load(path: str) -> ConfigDict:
    """The config of `path`, or of `path:argument`, as the file has it."""
    file, _, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def config_field(config: ConfigDict, name: str):
    """The value of a dotted name."""
    for part in name.split("."):
        config = config[part]
    return config
