"""Every field of an experiment, with the paper's values for 32x32 images.

configs/default.py hands them to the config files beside it.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()

  # scratch; lwf, at, lwf_at (imitated outputs, attention, both); fm_single,
  # fm_one_to_one, fm_all_to_all (matching with fixed weights); l2t_w_single,
  # l2t_w_one_to_one (learned channel weights); l2t_ww; finetune (where shapes
  # agree); kd (where classes agree).
  config.method = "l2t_ww"
  # Of initialisation, order of images and augmentation; not of the split.
  config.seed = 0
  config.epochs = 200
  # Over all devices.
  config.batch_size = 128
  # f32; tf32 (matrix products on tensor cores); bf16 (activations).
  config.precision = "f32"
  # Whether parameters and optimizer state are split over the devices, too, for
  # networks that do not fit on one; the numbers are the same.
  config.shard_params = False
  # What an iteration with NaN or infinity in a loss or gradient does: stop (the
  # run, which names it), or skip (leaves everything as it was).
  config.bad_numbers = "stop"

  config.data = config_dict.ConfigDict()
  # Where images come from: bundled, npz, folder or tfds.
  config.data.source = "tfds"
  # Name of a bundled ("mnist", "digits") or tfds data set.
  config.data.name = ""
  # The npz file, the folder of images, or tfds's data_dir ("" for its own).
  config.data.path = ""
  # Labels to keep, renumbered from 0; () for all.
  config.data.classes = ()
  # Height and width that images are resized to, in pixels.
  config.data.image_size = 32
  # 1 (grey) or 3 (RGB).
  config.data.channels = 3
  # Of the pixels, on a scale of 0 to 1: ImageNet's.
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  # none, crop (pad and crop), crop_flip, random_resized_crop_flip (streamed).
  config.data.augment = "crop_flip"
  # Pixels on each side before the random crop.
  config.data.crop_padding = 4
  # Streamed images: length of the short side before the centre crop; 0 for 8/7
  # of image_size, 256 where that is 224.
  config.data.eval_resize = 0
  # Index arrays {prefix}_train, {prefix}_val, {prefix}_test; "" for a
  # stratified split of our own.
  config.data.split_file = ""
  config.data.split_prefix = ""
  # Stratified split: shares of the training images, and its seed.
  config.data.val_fraction = 0.1
  config.data.test_fraction = 0.2  # Where there is no official test set.
  config.data.split_seed = 0
  # Labelled training images per class; 0 for all.
  config.data.per_class = 0
  # Whether images without labels join what is transferred: those that
  # per_class leaves over, or all in the folder unlabeled_path. L_org and
  # scratch never see them.
  config.data.unlabeled = False
  config.data.unlabeled_path = ""
  # Of them in an iteration; 0 for batch_size.
  config.data.unlabeled_batch_size = 0
  # Processes that decode streamed images; 0 for threads.
  config.data.num_workers = 8

  config.source = source()
  # Several sources: a name and the fields of config.source for each, in the
  # place of config.source; `config.sources.NAME = default.source()` in a config
  # file.
  config.sources = config_dict.ConfigDict()

  config.target = config_dict.ConfigDict()
  # A network of `l2t_jax.models`, or a function of your own as
  # "package.module:function" that takes num_classes and returns a Linen module,
  # or takes num_classes and rngs and returns an NNX module.
  config.target.model = "vgg9"
  # What it learns from labelled images: classification (cross-entropy), or a
  # l2t_jax.types.Task of your own as "package.module:NAME".
  config.target.task = "classification"
  # Outputs of the network (its num_classes); 0 for the number of classes, which
  # is refused where a task of your own reads several numbers an image.
  config.target.num_outputs = 0
  # Names of its layers, or globs such as "stages_*/blocks_2"; () for the
  # network's own choice, or else the last one of each resolution.
  # `python -m l2t_jax.models MODEL` lists what there is.
  config.target.taps = ()

  config.transfer = config_dict.ConfigDict()
  # "" for the method's own; single, one_to_one (equal resolutions), nearest
  # (each target tap with the source tap of the nearest resolution),
  # all_to_all, or a list such as "stage1_block5->conv2, stage3_block5->conv8".
  config.transfer.pairs = ""
  # Weight of the matching loss.
  config.transfer.beta = 0.5
  # "uniform" and "constant" (1) switch off what the method would learn.
  config.transfer.channel_weights = "learned"
  config.transfer.pair_weights = "learned"
  # What makes a pair weight of g's output: relu6, relu or softplus.
  config.transfer.pair_activation = "relu6"
  # transfer_map.json of another run: its pairs and their mean weights, frozen.
  config.transfer.map = ""

  # Learning without Forgetting: a second head imitates softened outputs.
  config.lwf = config_dict.ConfigDict()
  config.lwf.temperature = 2.0
  config.lwf.weight = 1.0

  # Attention transfer.
  config.at = config_dict.ConfigDict()
  config.at.beta = 1000.0

  # Knowledge distillation.
  config.kd = config_dict.ConfigDict()
  config.kd.temperature = 4.0
  config.kd.weight = 1.0

  # SGD of the real update and of the look-ahead.
  config.optimizer = config_dict.ConfigDict()
  config.optimizer.learning_rate = 0.1
  # By epochs: cosine (to 0), or step (a tenth at 50 % and at 75 %).
  config.optimizer.schedule = "cosine"
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  # Norm over all arrays that gradients are scaled down to; 0 for no clipping.
  config.optimizer.clip_norm = 0.0

  # Adam of the meta-networks, with L2 in the gradient.
  config.meta = config_dict.ConfigDict()
  config.meta.learning_rate = 1e-4
  config.meta.weight_decay = 1e-4
  # Likewise, of the hypergradient.
  config.meta.clip_norm = 0.0
  # Iterations between two meta updates.
  config.meta.update_every = 1

  config.bilevel = config_dict.ConfigDict()
  # T, steps of the look-ahead.
  config.bilevel.num_inner_steps = 2
  # What those steps minimise: auxiliary (L_wfm; one step with L_org follows
  # them), or total (L_org + L_wfm; the usual bilevel scheme).
  config.bilevel.look_ahead_loss = "auxiliary"
  # How the hypergradient is computed: reverse, remat, mixed, linearized; auto
  # is linearized (the fastest), or mixed where that does not fit into memory.
  config.bilevel.mode = "auto"
  # How the look-ahead loops: scan compiles as fast for any T; unroll is about
  # a tenth faster on CPU from T = 4 on.
  config.bilevel.loop = "scan"

  # Where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow; the last
  # two have to be installed, and are told by their environment variables where
  # their server is.
  config.trackers = ("tensorboard",)
  # Iterations between two records of metrics.jsonl.
  config.log_every = 20
  # Epochs between two checkpoints.
  config.checkpoint_every = 1
  # Iterations between two more within an epoch; 0 for none.
  config.checkpoint_steps = 0

  return config


def source() -> config_dict.ConfigDict:
  """Fields of a source network."""
  config = config_dict.ConfigDict()
  # Weights of the source network, from `python -m l2t_jax.pretrained` or
  # "target.safetensors" of an earlier run; they name the network.
  config.weights = ""
  # Its taps, as in target.taps. Pairs that are listed in transfer.pairs choose
  # among all taps instead.
  config.taps = ()
  # Height and width of the images that it sees; 0 for those of the data.
  config.image_size = 0
  # Its normalisation; () for that of the run that trained it, where that is
  # known, or else that of the data.
  config.mean = ()
  config.std = ()
  return config
