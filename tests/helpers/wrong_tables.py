"""Wrong command lines, one per line, and wrong texts, for `wrong_inputs`: each changes one thing that works."""

from __future__ import annotations

SAMPLED = "--validation.enabled true --validation.num_prompts 1 --validation.num_videos 0"
"""A validation of one prompt."""

CONFIGURATION = r"""
--training.steps 0
--training.steps 1.5
--training.stepz 5
--training.global_batch_size 0
--training.global_batch_size 3
--training.local_batch_size 1073741824 --training.global_batch_size 1073741824
--training.dtype float8
--training.max_grad_norm nan
--training.max_grad_norm 0
--job.seed -1
--job.name a/b
--job.imports "['no_such_module']"
--job.imports "['os; import sys']"
--job.config_file {new}/none.toml
--job.config_file {new}
--job.config_file /dev/null
--recipe.method dmd3
--recipe.family wam
--recipe.family nobody
--roles.student.trainable false
--roles.teacher.trainable true
--roles.student.flavor tiny
--roles.student.lora.rank 25
--roles.student.lora.rank -1
--roles.student.lora.target_modules "['nothing']" --roles.student.lora.rank 2
--roles.student.attention sparse --sparse_attention.sparsity 1
--roles.student.optimizer.lr nan
--roles.student.optimizer.lr -0.1
--roles.teacher.optimizer.lr 0.1
--roles.nobody.path {net} --roles.nobody.trainable true
--roles.student.init_from {net} --roles.student.path {net}
--roles.critic.path "" --roles.critic.init_from {net}#student
--roles.critic.path ""
--optimizer.betas "[0.9, 1.0]"
--optimizer.weight_decay nan
--ema.decay 1.0
--ema.decay nan
--ema.role teacher
--ema.role nobody
--method_config.guidance_scale nan
--method_config.guidance_scale inf
--method_config.denoising_steps "[]"
--method_config.denoising_steps "[500.0, 1000.0]"
--method_config.denoising_steps "[1000.0, nan]"
--method_config.update_ratio 0
--method_config.min_step 980.0 --method_config.max_step 20.0
--method_config.teacher_steps 0
--method_config.adversarial_weight nan
--method_config.discriminator_depths "[]"
--method_config.discriminator_depths "[2]"
--pipeline_config.path {new}/none
--pipeline_config.flow_shift nan
--pipeline_config.height 112
--pipeline_config.num_frames 16
--pipeline_config.num_frames 13
--pipeline_config_path {new}/none.toml
--data.path ""
--data.path {new}/none.parquet
--data.path {net}
--data.num_workers 1000000
--data.num_workers 1000000 --training.steps 1000000000
--data.max_text_tokens 8
--data.max_text_tokens 1000000000000
--parallelism.tensor 2
--parallelism.dp_shard 4
--parallelism.async_tensor true
--activation_checkpoint.mode full --activation_checkpoint.skip_interval 1
--float8.enabled true --float8.emulate true --float8.roles "['nobody']"
--validation.enabled perhaps
--validation.num_videos 2000 --validation.enabled true
--validation.num_prompts 100000000000 --validation.enabled true
--profiling.start_step 99 --profiling.enabled true
--comm.train_timeout_seconds 99999999999
"""
"""Overrides of the small job."""

SHAPES = f"{SAMPLED} --validation.scorer shapes"
SCORERS = f"""
--validation.enabled true --validation.scorer shape
{SHAPES} --validation.prompts {{new}}/foreign.txt
{SHAPES} --pipeline_config.height 32 --pipeline_config.width 32 --data.path {{assets}}/tiny_shapes/prompts.parquet
--validation.enabled true --validation.prompts {{new}}/none.txt
--validation.enabled true --validation.prompts {{net}}
"""
"""Overrides with scorers and prompts that do not fit, or are not there."""

RESUMED = "--checkpoint.resume_from latest --job.output_dir {run}"
RESUME = f"""
--checkpoint.resume_from {{new}}/none
--checkpoint.resume_from {{run}}/logs
--checkpoint.resume_from {{run}}/checkpoints/step-00000007
--checkpoint.resume_from {{run}}/checkpoints/latest#student
{RESUMED} --job.overwrite true
{RESUMED} --job.seed 1
{RESUMED} --training.global_batch_size 4
{RESUMED} --ema.decay 0
{RESUMED} --method_config.update_ratio 2
{RESUMED} --roles.student.lora.rank 2
{RESUMED} --pipeline_config.num_frames 13
{RESUMED} --data.path {{data}}
{RESUMED} --data.path {{new}}/none.parquet
{RESUMED} --job.config_file train_configs/tiny_wan_finetune.toml --validation.enabled false
{RESUMED} --job.config_file train_configs/tiny_wan_dmd2.toml --validation.enabled false
--job.output_dir {{run}}
"""
"""Overrides that resume the run of one step as something that it is not."""

OUTPUT = r"""
--job.output_dir {new}/file
--job.output_dir /proc/nowhere/run
--job.output_dir /sys/run
--job.output_dir /dev/null
--job.output_dir {new}/{long}
--job.output_dir "" --job.name {long}
"""
"""Folders that cannot be written, or that hold another run."""

GENERATE = "generate --checkpoint {run}/checkpoints/latest --prompt x --out {new}/x.mp4"
EXPORT = "checkpoint export --checkpoint {run}/checkpoints/latest --out {new}/x"
KD = "train_configs/tiny_wan_kd.toml"
ENCODERS = "--vae {pipe} --text-encoder {pipe}"
PREPROCESS = f"data preprocess {{new}}/videos --captions {{new}}/captions.csv --out {{new}}/x {ENCODERS}"
PAIRS = f"data ode-pairs {KD} --prompts {{new}}/foreign.txt --out {{new}}/x"
COMMANDS = f"""
genrate --checkpoint x
generate --checkpont {{run}} --prompt x --out {{new}}/x.mp4
generate --checkpoint {{new}}/none --prompt x --out {{new}}/x.mp4
generate --checkpoint {{net}} --prompt x --out {{new}}/x.mp4
generate --checkpoint {{run}}/checkpoints/latest --prompt "" --out {{new}}/x.mp4
generate --checkpoint {{run}}/checkpoints/latest --prompt x --out {{new}}/x.gif
generate --checkpoint {{run}}/checkpoints/latest --prompt x --out {{new}}
generate --checkpoint {{run}}/checkpoints/latest --prompt x --out {{new}}/file/x.mp4
{GENERATE} --role nobody
{GENERATE} --role discriminator
{GENERATE} --role critic
{GENERATE} --num-steps 0
{GENERATE} --num-steps 7
{GENERATE} --guidance-scale nan
{GENERATE} --num-frames 33
{GENERATE} --seed -1
{GENERATE} --cache-window-frames -1
{GENERATE} --image {{new}}/none.png
{GENERATE} --image {{new}}/file
checkpoint list {{new}}/none
checkpoint list {{run}}/checkpoints/step-00000001
checkpoint verify {{net}}
checkpoint verify {{new}}/none
checkpoint export --checkpoint {{run}}/checkpoints/latest --out {{run}}
checkpoint export --checkpoint {{run}}/checkpoints/latest --out {{new}}/file/x
{EXPORT} --role nobody
{EXPORT} --role critic --weights ema
{EXPORT} --pipeline {{net}}
checkpoint export --checkpoint {{net}} --out {{new}}/x
checkpoint import {{new}}/none
checkpoint import {{data}}
checkpoint import {{net}} --family nobody
checkpoint reshard {{run}}/checkpoints/latest --out {{new}}/x --num-files 0
checkpoint reshard {{run}}/checkpoints/latest --out {{run}} --num-files 2
checkpoint diff {{run}}/checkpoints/latest {{new}}/none
plan {{new}}/none.toml
plan {{job}} --gpu RTX
plan {{job}} --parallelism.tensor 3
data inspect --path {{new}}/none
{PREPROCESS} --height 100
{PREPROCESS} --num-frames 33
{PREPROCESS} --fps nan
{PREPROCESS} --stride -1
{PREPROCESS} --max-text-tokens 0
{PREPROCESS} --device gpu
{PREPROCESS} --family nobody
data preprocess {{new}}/videos --captions {{new}}/captions.csv --out {{new}}/file {ENCODERS}
data preprocess {{new}}/videos --captions {{new}}/captions.csv --out {{new}}/x --vae {{net}} --text-encoder {{net}}
data preprocess {{new}}/videos --captions {{new}}/captions.csv --out {{new}}/x
data preprocess {{new}}/none --captions {{new}}/captions.csv --out {{new}}/x {ENCODERS}
data preprocess {{new}}/videos --captions {{new}}/none.csv --out {{new}}/x {ENCODERS}
data preprocess {{new}}/videos --captions {{new}}/file --out {{new}}/x {ENCODERS}
data ode-pairs {{new}}/none.toml --prompts {{new}}/foreign.txt --out {{new}}/x
data ode-pairs {KD} --prompts {{new}}/none.txt --out {{new}}/x
data ode-pairs {KD} --prompts {{new}}/foreign.txt --out {{new}}/file
{PAIRS} --num-steps 0
{PAIRS} --times 1234
{PAIRS} --times nan
{PAIRS} --guidance-scale nan
{PAIRS} --batch-size 0
{PAIRS} --seed -1
{PAIRS} --num-pairs 0
{PAIRS} --teacher {{new}}/none
{PAIRS} --teacher {{pipe}}/vae
"""
"""Commands with a video of 20 frames and its caption in videos and captions.csv, and a text file named file."""

ENVIRONMENT = {
    "WORLD_SIZE": ("abc", "0", "", "2"),
    "RANK": ("1", "x"),
    "LOCAL_RANK": ("x",),
    "LOCAL_WORLD_SIZE": ("0",),
}
"""Variables of ranks, in this process."""

SHELL_ENVIRONMENT = {
    "NGPU": ("0", "abc", "-1", "9999999"),
    "LOG_RANK": ("x", "5"),
    "WORLD_SIZE": ("abc",),
    "CONFIG_FILE": ("none.toml",),
}
"""Variables through run_train.sh, each in a real process."""

PROMPTS: dict[str, tuple[str, bytes]] = {
    "no lines": ("p.txt", b""),
    "another encoding": ("p.txt", "größe".encode("latin-1")),
    "UTF-16": ("p.txt", "a red circle".encode("utf-16")),
    "an unknown ending": ("p.docx", b"a red circle\n"),
    "CSV without its column": ("p.csv", b"text\na red circle\n"),
    "CSV with an empty prompt": ("p.csv", b'prompt\na red circle\n""\n'),
    "empty CSV": ("p.csv", b""),
    "CSV of bytes": ("p.csv", b"prompt\n\xff\xfe\n"),
    "CSV with an endless field": ("p.csv", b'prompt\n"' + b"x" * 200_000 + b"\n"),
    "JSON lines without the key": ("p.jsonl", b'{"text": "x"}\n'),
    "JSON lines cut": ("p.jsonl", b'{"caption": "x"\n'),
    "JSON lines of numbers": ("p.jsonl", b'{"caption": 3}\n'),
    "JSON lines nested without end": ("p.jsonl", b"[" * 100_000),
    "parquet of text": ("p.parquet", b"a red circle\n"),
    "a folder of nothing": ("p/x.md", b""),
}
VIDEOS: dict[str, bytes] = {
    "no column of videos": b"prompt\nx\n",
    "no column of prompts": b"video\nvideos/a.mp4\n",
    "no rows": b"video,prompt\n",
    "nothing": b"",
    "another encoding": "video,prompt\nvideos/a.mp4,größe\n".encode("latin-1"),
    "a missing video": b"video,prompt\nvideos/none.mp4,x\n",
    "an empty prompt": b"video,prompt\nvideos/a.mp4,\n",
    "a folder for a video": b"video,prompt\nvideos,x\n",
    "text for a video": b"video,prompt\nfile,x\n",
    "a cut video": b"video,prompt\ncut.mp4,x\n",
    "a short video": b"video,prompt\nshort.mp4,x\n",
}
"""Content of a CSV of videos and prompts; two of the videos cannot be used."""
CAPTIONS: dict[str, bytes] = {
    "no column": b"file,caption\na.mp4,x\n",
    "a name twice": b"file_name,caption\na.mp4,x\na.mp4,y\n",
    "a name too many": b"file_name,caption\na.mp4,x\nb.mp4,y\n",
    "no caption": b"file_name,caption\na.mp4,\n",
    "another encoding": "file_name,caption\na.mp4,größe\n".encode("latin-1"),
}
TOML: dict[str, bytes] = {
    "empty": b"",
    "not TOML": b"job = {",
    "UTF-16": "[job]\nname = 'x'\n".encode("utf-16"),
    "a key twice": b"[job]\nname = 'x'\nname = 'y'\n",
    "an array of tables": b"[[job]]\nname = 'x'\n",
    "nested without end": b"a = " + b"[" * 100_000,
    "no method": b"[job]\nname = 'x'\n",
}
