"""Every field of a config with its default, and the functions that recipes start from.

A recipe is a Python file with `get_config(argument=None) -> ConfigDict`. It calls `pretrain_config`, `linear_config`,
`finetune_config` or `segment_config` and sets its own numbers. `--print_config` prints the resulting fields.

A value that follows from another one is a reference, so that it also follows an override on the command line. Fields
have the names of the function arguments that they become.
"""

import importlib.util
import json
from collections.abc import Iterator

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from simmim_jax.errors import ConfigError, differences

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

WHOLE = ("evals", "imported", "phases", "pixels")  # trees of open content, each compared as one field

# Fields that may change when a run resumes, because no parameter depends on them. A run adds `classes`, `imported`,
# `phases`, `pixels` and `untrained_classes` to its config.json. `pixels` has what `bands`, `nodata` and `value_range`
# led to. The data's fingerprint guards the fields that choose images.
FREE = (
    "check_memory", "classes", "eval_batch_size", "eval_every", "eval_images", "evals", "imported", "keep_best",
    "keep_period", "log_every", "max_nonfinite_steps", "max_to_keep", "microbatches", "online_probes", "patience",
    "phases", "probe_block", "profile_steps", "save_every", "untrained_classes",
    "data.bands", "data.crop_fraction", "data.data_dir", "data.max_bad_fraction", "data.max_nodata", "data.name",
    "data.nodata", "data.on_error", "data.path", "data.prefetch", "data.source", "data.threads", "data.value_range",
    "data.workers",
    "encoder.attention", "encoder.remat", "encoder.scan", "encoder.size",
    "mesh.data", "mesh.fsdp", "mesh.tensor",
)  # fmt: skip

# Fixed fields that a new phase of a run may change (--extend). `phases` is in config.json only: see `new_phase`.
EXTENDABLE = (
    "base_learning_rate", "epochs", "steps",
    "optim.gamma", "optim.learning_rate", "optim.milestones", "optim.min_learning_rate", "optim.schedule",
    "optim.warmup_epochs", "optim.warmup_fraction", "optim.warmup_learning_rate", "optim.weight_decay",
)  # fmt: skip

# Fields that a resumed run must keep. A field in neither list, like the option of an added encoder, must be kept too.
FIXED = (
    "base_learning_rate", "batch_size", "ema_decay", "epochs", "image_size", "init_from", "init_parts", "mean", "seed",
    "pixels", "std", "steps",
    "data.augment", "data.color_jitter", "data.crop_ratio", "data.crop_scale", "data.flip", "data.heldout_fraction",
    "data.heldout_split", "data.interpolation", "data.max_pixels", "data.split",
    "data.maps.channel", "data.maps.ignore", "data.maps.most_of_one", "data.maps.photometric",
    "data.maps.reduce_zero_label", "data.maps.scale", "data.maps.short_side",
    "encoder.absolute_position", "encoder.class_position", "encoder.class_token", "encoder.depth", "encoder.depths",
    "encoder.drop_path", "encoder.dtype", "encoder.final_norm", "encoder.init_truncation", "encoder.layer_scale",
    "encoder.mlp_ratio", "encoder.name", "encoder.norm_epsilon", "encoder.norm_momentum", "encoder.num_heads",
    "encoder.num_registers", "encoder.patch_norm", "encoder.patch_size", "encoder.pretrained_windows",
    "encoder.qkv_bias", "encoder.relative_position", "encoder.width", "encoder.widths", "encoder.window",
    "objective.auxiliary_weight", "objective.block", "objective.blocks", "objective.channels", "objective.cutmix",
    "objective.fc_norm", "objective.head", "objective.head_init_scale", "objective.label_smoothing", "objective.mask",
    "objective.mask_patch_size", "objective.mask_ratio", "objective.mixup", "objective.mixup_group",
    "objective.mixup_mode", "objective.mixup_prob", "objective.mixup_switch_prob", "objective.name",
    "objective.norm_window", "objective.num_classes", "objective.pool", "objective.recount", "objective.remode",
    "objective.reprob", "objective.train_encoder",
    "optim.betas", "optim.decay_rule", "optim.epsilon", "optim.frozen", "optim.frozen_layers", "optim.gamma",
    "optim.grad_clip_norm", "optim.layer_decay", "optim.learning_rate", "optim.lr_step_offset", "optim.milestones",
    "optim.min_learning_rate", "optim.name", "optim.schedule", "optim.warmup_epochs", "optim.warmup_fraction",
    "optim.warmup_learning_rate", "optim.weight_decay",
)  # fmt: skip


def base_config() -> ConfigDict:
    """The fields of every run."""
    c = ConfigDict()
    c.seed = 0  # seed of the parameters, masks, crops, order of images and other random draws
    c.epochs = 100.0  # length of the run; an epoch is number of images // batch_size steps
    c.steps = 0  # length of the run in steps; 0: use epochs
    c.batch_size = 2048  # global batch size, over all devices and processes
    c.microbatches = 1  # equal parts of a batch, processed in turn to save memory; same update, except for batch norm
    c.init_from = ""  # workdir, or step folder in it, whose parameters the run starts from; empty: random parameters
    c.init_parts = ()  # parts of init_from: encoder, mask_token, head; empty: all for the same objective, else encoder
    c.image_size = (224, 224)  # height and width of training images in pixels
    c.mean = ()  # mean of each channel on the scale 0..1; empty: ImageNet's for 8-bit RGB, else that of some images
    c.std = ()  # standard deviation of each channel on the scale 0..1; empty: as for the mean

    c.mesh = ConfigDict()  # number of devices along each mesh axis; -1: all remaining devices
    c.mesh.data = -1  # axis that splits the batch and replicates parameters
    c.mesh.fsdp = 1  # axis that splits the batch, the parameters and their optimizer state
    c.mesh.tensor = 1  # axis that splits attention heads and hidden units
    c.check_memory = True  # refuse a run whose compiled step needs more memory than a device has

    c.data = ConfigDict()
    c.data.source = "auto"  # digits, folder, list, tar, parquet, array_record or tfds; auto: decide by path and name
    c.data.path = ""  # folder of images, folder of prepared shards, list file, or tar or Parquet file or files
    c.data.name = ""  # name of a TFDS dataset
    c.data.data_dir = ""  # TFDS's data folder, or the folder that paths in a list file are relative to
    c.data.split = "train"  # part that is trained on
    c.data.heldout_split = "validation"  # part that is evaluated
    c.data.heldout_fraction = placeholder(float)  # fraction held out of data without evaluation split; None: 2 %, >= 8
    c.data.bands = ()  # bands to read from each file, by name or by number from 1, in this order; empty: all
    c.data.value_range = ()  # low,high that become 0 and 1, of all bands or of each; empty: 0,255, or percentiles
    c.data.nodata = placeholder(float)  # value of pixels without data; None: as in the files
    c.data.max_nodata = 1.0  # largest fraction of an image that may have no data; images with more are skipped
    c.data.crop_scale = (0.67, 1.0)  # range of a random crop's area as a fraction of the image
    c.data.crop_ratio = (3 / 4, 4 / 3)  # range of a random crop's width / height
    c.data.flip = 0.5  # probability of a horizontal flip
    c.data.interpolation = "bilinear"  # filter of the resize: bilinear or bicubic
    c.data.augment = ""  # RandAugment as timm writes it, like rand-m9-mstd0.5-inc1; empty: none
    c.data.color_jitter = 0.0  # strength of random brightness, contrast and saturation; 0: none
    c.data.crop_fraction = 1.0  # side of an evaluated image's center crop / its shorter side; 0.875: 224 of 256
    c.data.workers = -1  # decoder processes; 0: decode in this process; -1: one per core but one on GPU/TPU, 0 on CPU
    c.data.threads = 2  # batches that each decoder process makes at a time
    c.data.prefetch = 4  # finished batches that each decoder process keeps ready
    c.data.on_error = "replace"  # what happens to an unreadable image; replace: use another image; raise: stop the run
    c.data.max_bad_fraction = 0.01  # largest fraction of unreadable images in an epoch before the run stops
    c.data.max_pixels = 64_000_000  # largest image that is decoded, in pixels

    c.encoder = encoder_config("vit", "b")

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # optimizer: adamw or sgd
    c.optim.schedule = "cosine"  # cosine, cosine_global (starts with the warm-up), multistep, linear, constant
    c.base_learning_rate = 1e-4  # peak learning rate for a batch of 512 (main_simmim.py of microsoft/SimMIM)
    c.optim.learning_rate = c.get_ref("base_learning_rate") * c.get_ref("batch_size") / 512  # peak learning rate
    c.optim.warmup_fraction = 0.1  # length of the linear warm-up as a fraction of the run
    c.optim.warmup_epochs = placeholder(float)  # length of the linear warm-up in epochs; None: use warmup_fraction
    c.optim.warmup_learning_rate = scale_with_batch(c, 5e-7)  # learning rate that the warm-up starts from
    c.optim.min_learning_rate = scale_with_batch(c, 1e-5)  # learning rate at the end of a cosine or linear schedule
    c.optim.milestones = ()  # epochs at which the multistep schedule multiplies the rate by gamma
    c.optim.gamma = 0.1  # factor at each milestone
    c.optim.lr_step_offset = 0  # delay of the rate in steps; 1: as in official code, which updates it after the step
    c.optim.betas = (0.9, 0.999)  # AdamW's decay rates of the first and second moment; SGD uses the first as momentum
    c.optim.epsilon = 1e-8  # AdamW's term in the denominator
    c.optim.weight_decay = 0.05  # decoupled weight decay (AdamW) or L2 penalty (SGD); not of biases and norms
    c.optim.decay_rule = "official"  # official; intended: position biases of a Swin never decay (`Encoder.no_decay`)
    c.optim.layer_decay = 1.0  # factor on the peak rate from each layer to the layer below; 1: same rate for all
    c.optim.grad_clip_norm = 5.0  # largest global norm of the gradient; 0: no clipping
    c.optim.frozen = ""  # regular expression for the start of parameter paths; those parameters are not trained
    c.optim.frozen_layers = 0  # lowest encoder layers that are not trained; 1: patch embedding, n: also n - 1 blocks
    c.ema_decay = 0.0  # decay of an average of the parameters, like 0.9999, which is evaluated and exported; 0: none

    c.evals = ConfigDict()  # evaluators: their options by name
    c.eval_every = 0  # steps between evaluations; 0: only at the start and end; -1: as often as 3 % of the work allows
    c.eval_images = 2000  # held-out images of an evaluation, and training images of kNN and linear probe; 0: all
    c.eval_batch_size = c.get_ref("batch_size") // c.get_ref("microbatches")  # global batch size of evaluations
    c.online_probes = False  # add the evaluators knn and linear with their defaults if the images have classes
    c.probe_block = 0  # block whose output kNN and linear probe read, 1 to depth; 0: the encoder's final features

    c.log_every = 10  # steps between rows of metrics
    c.save_every = 1000  # steps between checkpoints
    c.max_to_keep = 2  # newest checkpoints that are kept
    c.keep_period = 0  # also keep checkpoints whose step is a multiple of this; 0: none
    c.keep_best = ""  # also keep the checkpoint with the best value of this evaluation metric, like linear; empty: none
    c.patience = 0  # evaluations without a better keep_best after which the run ends; 0: it does not end early
    c.profile_steps = ()  # first and last step of a trace for TensorBoard's profiler, like 20,25; empty: no trace
    c.max_nonfinite_steps = 3  # consecutive steps with a NaN or infinite loss or gradient before the run stops
    return c


def scale_with_batch(config: ConfigDict, rate: float) -> FieldReference:
    """The learning rate `rate` of a batch of 512, scaled linearly to the config's batch size."""
    return FieldReference(rate) * config.get_ref("batch_size") / 512


def encoder_config(name: str, size: str) -> ConfigDict:
    """The fields of all encoders. None means the value of the size in the encoder's `SIZES`, or the class's default.

    A field that the encoder does not have must stay None. With an empty name the run uses the encoder of `init_from`,
    changed by the fields that are set here.
    """
    c = ConfigDict({"name": name, "size": size})  # convnext, resnet, swin, swinv2 or vit; entry in its SIZES
    c.width = placeholder(int)  # channels: of all blocks (ViT) or of the first stage (Swin, ResNet)
    c.widths = placeholder(tuple)  # channels of each stage (ConvNeXt)
    c.depth = placeholder(int)  # number of blocks (ViT)
    c.depths = placeholder(tuple)  # number of blocks in each stage (Swin, ConvNeXt, ResNet)
    c.num_heads = placeholder(tuple)  # attention heads: one number (ViT) or one per stage (Swin)
    c.mlp_ratio = placeholder(float)  # hidden units of the MLP / channels
    c.patch_size = placeholder(int)  # side of a patch in pixels
    c.window = placeholder(int)  # side of an attention window in tokens (Swin)
    c.pretrained_windows = placeholder(tuple)  # window of each stage in pretraining, to scale positions by (Swin V2)
    c.class_token = placeholder(bool)  # whether a class token joins the patches (ViT)
    c.num_registers = placeholder(int)  # number of learned tokens that only take part in attention (ViT)
    c.class_position = placeholder(bool)  # whether the class token has an absolute position too (ViT)
    c.absolute_position = placeholder(str)  # position embedding of tokens: none, learned or sincos (ViT)
    c.relative_position = placeholder(str)  # relative position bias: none, shared or per_block (ViT)
    c.qkv_bias = placeholder(str)  # biases of the attention's input projections: qkv, qv or none
    c.layer_scale = placeholder(float)  # initial value of LayerScale; 0: none
    c.patch_norm = placeholder(bool)  # whether a LayerNorm follows the patch embedding (Swin)
    c.final_norm = placeholder(bool)  # whether a LayerNorm follows the last block
    c.norm_epsilon = placeholder(float)  # epsilon of the norms
    c.norm_momentum = placeholder(float)  # weight of a new batch in running statistics, as in PyTorch (ResNet)
    c.drop_path = placeholder(float)  # rate of stochastic depth in the last block; grows linearly from 0 in the first
    c.init_truncation = placeholder(float)  # cut of the initial normal distributions in standard deviations
    c.dtype = placeholder(str)  # type of matmul inputs: float32 or bfloat16
    c.remat = placeholder(str)  # what the backward pass recomputes: none, attention, dots or full (least memory)
    c.scan = placeholder(bool)  # compile one block and scan over all: shorter compilation
    c.attention = placeholder(str)  # attention kernel: xla, cudnn or auto
    return c


def pretrain_config() -> ConfigDict:
    """SimMIM pretraining with 60 % of 32-pixel patches masked; held-out loss, pictures and probes."""
    c = base_config()
    c.objective = ConfigDict({"name": "simmim"})
    c.objective.mask = "random"  # mask strategy
    c.objective.mask_patch_size = 32  # side of a masked patch in pixels
    c.objective.mask_ratio = 0.6  # fraction of patches that are masked, between 0 and 1
    c.objective.norm_window = 0  # side in pixels of the window around each pixel that normalizes the target; 0: none
    c.evals.reconstruction = ConfigDict({"pictures": 8})
    c.online_probes = True
    c.eval_every = -1
    return c


def classify_config() -> ConfigDict:
    """The fields of linear evaluation and fine-tuning: official crops, accuracy on all held-out images."""
    c = base_config()
    c.data.crop_scale = (0.08, 1.0)
    c.data.crop_fraction = 0.875
    c.data.interpolation = "bicubic"
    c.eval_images = 0
    c.evals.accuracy = ConfigDict({})
    c.objective = ConfigDict({"name": "classify"})
    c.objective.num_classes = 1000  # number of classes
    c.objective.block = 0  # block whose features are classified, 1 to depth; 0: the encoder's final features
    c.objective.pool = "patches"  # classified features: patches (mean), class_token, or both
    c.objective.fc_norm = placeholder(bool)  # LayerNorm between pooling and head; None: if the encoder ends without one
    c.objective.head_init_scale = 1.0  # factor on the head's initial weights N(0, 0.02)
    c.objective.label_smoothing = 0.0  # probability mass spread over all classes, 0 to 1
    c.objective.train_encoder = True  # whether stochastic depth and batch statistics are active
    return c


def linear_config() -> ConfigDict:
    """Linear evaluation: a frozen encoder and a linear classifier on the mean patch feature of one block."""
    c = classify_config()
    c.objective.block = 8
    c.objective.fc_norm = True
    c.objective.head_init_scale = 0.001
    c.objective.train_encoder = False
    c.optim.frozen = "encoder/"
    c.optim.weight_decay = 0.0
    c.optim.warmup_epochs = 0.0
    c.optim.min_learning_rate = 0.0
    return c


def finetune_config() -> ConfigDict:
    """Fine-tuning of another run's encoder.

    Rates, decay, schedule, head, augmentation and mixing are those of a Swin in config.py, main_finetune.py and
    data_finetune.py of microsoft/SimMIM. Its color jitter of 0.4 has no effect there, because timm skips color jitter
    next to RandAugment.
    """
    c = classify_config()
    c.encoder = encoder_config("", "")
    c.encoder.drop_path = 0.1
    c.data.augment = "rand-m9-mstd0.5-inc1"
    c.objective.label_smoothing = 0.1
    c.objective.mixup = 0.8  # alpha of Mixup's Beta(alpha, alpha); 0: no Mixup
    c.objective.cutmix = 1.0  # alpha of CutMix's Beta(alpha, alpha); 0: no CutMix
    c.objective.mixup_prob = 1.0  # probability that Mixup or CutMix is applied
    c.objective.mixup_switch_prob = 0.5  # probability of CutMix instead of Mixup if both are on
    c.objective.mixup_mode = "batch"  # one draw per batch, pair or elem
    c.objective.mixup_group = 0  # consecutive images with one draw, mixed with each other; 0: the whole batch
    c.objective.reprob = 0.25  # probability of random erasing
    c.objective.remode = "pixel"  # fill of erased boxes: pixel (noise per pixel), rand (one color) or const (0)
    c.objective.recount = 1  # largest number of erased boxes in an image
    c.epochs = 100.0
    c.base_learning_rate = 1.25e-3
    c.optim.schedule = "cosine_global"
    c.optim.lr_step_offset = 1
    c.optim.warmup_epochs = 20.0
    c.optim.warmup_learning_rate = scale_with_batch(c, 2.5e-7)
    c.optim.min_learning_rate = scale_with_batch(c, 2.5e-7)
    c.optim.layer_decay = 0.8
    return c


def segment_config(head: str = "linear") -> ConfigDict:
    """Semantic segmentation with another run's encoder: frozen below a `linear` head, or trained with `upernet`.

    Crops, schedule and decay are those of BEiT's UPerNet on ADE20K (microsoft/unilm, beit/semantic_segmentation).
    """
    c = base_config()
    c.encoder = encoder_config("", "")
    c.objective = ConfigDict({"name": "segment"})
    c.objective.num_classes = 150  # number of classes
    c.objective.head = head  # linear or upernet
    c.objective.block = 0  # block whose output the linear head reads, 1 to depth; 0: the encoder's final features
    c.objective.blocks = ()  # four blocks that UPerNet reads from a ViT; empty: the block at each quarter of the depth
    c.objective.channels = 512  # channels of UPerNet's maps
    c.objective.auxiliary_weight = 0.4  # weight of UPerNet's auxiliary loss; 0: no auxiliary head
    c.objective.train_encoder = head != "linear"  # whether stochastic depth and batch statistics are active
    c.image_size = (512, 512)  # height and width of crops, and of the windows in evaluation, in pixels
    c.batch_size = 16
    c.data.maps = ConfigDict()
    c.data.maps.reduce_zero_label = False  # whether 0 in a file means no class, and class n is stored as n + 1
    c.data.maps.ignore = 255  # value in a file that means no class
    c.data.maps.channel = -1  # channel that holds the class in maps with several channels; -1: refuse such maps
    c.data.maps.short_side = 0  # shorter side that images are scaled to, in pixels; 0: that of the crop; -1: no scaling
    c.data.maps.scale = (0.5, 2.0)  # range of the random scale factor
    c.data.maps.most_of_one = 0.75  # largest fraction of a crop that one class may cover (mmseg's cat_max_ratio)
    c.data.maps.photometric = True  # random brightness, contrast, saturation and hue
    c.data.heldout_fraction = 0.1
    c.eval_images = 0
    c.evals.segmentation = ConfigDict({"pictures": 8, "step": 0})
    c.optim.schedule = "linear"
    c.optim.min_learning_rate = 0.0
    c.optim.warmup_learning_rate = 0.0
    if head == "linear":
        c.optim.frozen = "encoder/"
        c.optim.weight_decay = 0.0
        c.base_learning_rate = 3.2e-2  # 1e-3 for a batch of 16
        c.optim.warmup_epochs = 0.0
    else:
        c.encoder.drop_path = 0.1
        c.base_learning_rate = 3.2e-3  # 1e-4 for a batch of 16
        c.optim.warmup_epochs = 1.0
        c.optim.layer_decay = 0.75
    c.log_every = 50
    return c


def defaults(config: ConfigDict) -> ConfigDict:
    """The defaults of a config with this objective; those of every run if the objective has no family function."""
    families = {"simmim": pretrain_config, "classify": classify_config, "segment": segment_config}
    return families.get(config.objective.name, base_config)()


def changes(config: ConfigDict) -> dict:
    """The fields whose value is not the default, by dotted name."""
    default = dict(flat(to_dict(defaults(config))))
    return {name: value for name, value in flat(to_dict(config)) if default.get(name) != value}


def load(path: str) -> ConfigDict:
    """The config of the recipe `FILE.py`, or of `FILE.py:argument`."""
    file, _, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def to_dict(config: ConfigDict) -> dict:
    """The config as plain JSON data with references resolved, as config.json holds it."""
    return json.loads(config.copy_and_resolve_references().to_json())


def flat(tree: dict, prefix: str = "", whole: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every field. Trees named in `whole` are single values."""
    for name, value in tree.items():
        if isinstance(value, dict) and value and prefix + name not in whole:
            yield from flat(value, f"{prefix}{name}.", whole)
        else:
            yield prefix + name, value


def new_phase(saved: dict, now: dict) -> dict:
    """The fields of `EXTENDABLE` whose values differ, with their new values. Both configs are as in config.json."""
    old, new = (dict(flat(tree, whole=WHOLE)) for tree in (saved, now))
    return {name: new[name] for name in EXTENDABLE if name in new and old.get(name) != new[name]}


def refuse_change(saved: dict, now: dict, where: str) -> None:
    """Raise ConfigError with the difference if a run of the config `now` cannot resume a run of the config `saved`.

    Both are as config.json holds them. A field that an imported model's config.json lacks may have any value.
    """
    old, new = (dict(flat(tree, whole=WHOLE)) for tree in (saved, now))
    unknown = sorted(old.keys() - new.keys() - {*FREE, *FIXED})
    fix = "undo the change, or give a new --workdir"
    if unknown:
        what = f"config.json has fields that this config or version does not know: {', '.join(unknown)}"
        raise ConfigError(what, where, fix)
    names = old if "imported" in saved else old | new
    changed = {name for name in names if name not in FREE and old.get(name) != new.get(name)}
    if now.get("phases", []) != saved.get("phases", []):
        changed -= {*EXTENDABLE}
    if changed:
        if changed <= {*EXTENDABLE}:
            fix = "add --extend to continue with these settings as a new phase; or undo the change"
        shown = differences(*({name: side.get(name) for name in changed} for side in (old, new)))
        raise ConfigError(f"workdir of another config ({shown})", where, fix)
