"""What the command lines tell their user, without starting them."""

import io
import json

import numpy as np
import pytest
import torch
import train
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image

from tic_backbone import TiC
from tic_backbone.cli import (
    BadInput,
    LoadImageFromFile,
    argument_parser,
    check_data,
    data_files,
    explain,
    is_truncated,
    load_backbone,
    read_config,
    to_tensor,
)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_truncation_is_seen_wherever_the_file_ends(kind, options):
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(picture, kind, **options)
    whole = picture.getvalue()
    assert not is_truncated(whole) and not is_truncated(whole + b"\0" * 16)
    assert not is_truncated(whole + b"\xff\xd8\xff\xda film")  # as phones append one
    assert all(is_truncated(whole[:end]) for end in range(len(whole) // 2, len(whole) - 8, 97))


def test_embedded_thumbnail_does_not_hide_truncation():
    thumb = io.BytesIO()
    Image.new("RGB", (8, 8)).save(thumb, "jpeg")
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(picture, "jpeg", comment=thumb.getvalue())
    assert not is_truncated(picture.getvalue())
    assert is_truncated(picture.getvalue()[:-100])


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff"])
def test_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"photo\.jpg"):
        LoadImageFromFile().transform({"img_path": str(path)})


def test_missing_image_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"photo\.jpg"):
        LoadImageFromFile().transform({"img_path": str(tmp_path / "photo.jpg")})


def test_data_files_of_nested_datasets_and_evaluators():
    inner = dict(data_root="a/", ann_file="x.json", data_prefix=dict(img="train/"))
    nested = dict(dataset=dict(type="RepeatDataset", dataset=dict(datasets=[inner, dict(data_prefix="b/")])))
    cfg = Config(dict(val_dataloader=nested, val_evaluator=[dict(ann_file="a/y.json")]))
    assert list(data_files(cfg, "train", "val")) == ["a/x.json", "a/train/", "b/", "a/y.json"]


def test_check_data_speaks_for_configs_that_prepare_theirs(tmp_path):
    dataset = dict(data_root=str(tmp_path), ann_file="no.json")
    cfg = Config(dict(train_dataloader=dict(dataset=dataset), test_dataloader=None))
    check_data(cfg, "train")
    cfg.prepare_data = "make data"
    check_data(cfg, "test")
    with pytest.raises(BadInput, match=r"no\.json is not there; run: make data"):
        check_data(cfg, "train")


@pytest.mark.parametrize("content", [b"{", b"\x1f\x8b\x08\x00\xff", b""])
def test_a_file_that_is_not_json_is_found(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    cfg = Config(dict(train_dataloader=dict(dataset=dict(ann_file=str(path)))))
    with pytest.raises(ValueError) as info:
        json.load(path.open())
    assert str(path) in explain(info.value, cfg)


def test_only_the_users_errors_lose_their_traceback():
    """A check of this package, also when mmengine's registry wrapped it; nothing that a bug raises."""
    for make in (lambda: TiC("huge"), lambda: MODELS.build(dict(type="TiC", arch="huge"))):
        with pytest.raises(ValueError) as info:
            make()
        assert "arch='huge'" in explain(info.value, None)
    with pytest.raises(ValueError) as info:
        int("x")
    assert explain(info.value, None) is None


@pytest.mark.parametrize("path", ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "configs/tic_retinanet.py"])
def test_configs_are_found_by_path_and_in_packages(path, monkeypatch, root):
    monkeypatch.chdir(root)
    assert read_config(arguments(path)).model.type == "RetinaNet"


def arguments(config, *options):
    return argument_parser("").parse_args([config, *options])


def test_another_backbone_comes_before_the_options():
    config = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
    cfg = read_config(arguments(config, "--backbone", "tic_nano", "--cfg-options", "model.backbone.drop_path_rate=0.1"))
    assert cfg.model.backbone == dict(type="TiC", arch="nano", out_indices=(1, 2, 3), drop_path_rate=0.1)
    assert cfg.work_dir == "work_dirs/retinanet_r50_fpn_1x_coco_tic_nano"
    with pytest.raises(ValueError, match=r"'resnet'.*tic_nano"):
        read_config(arguments(config, "--backbone", "resnet"))


def test_impossible_options_are_named(root):
    with pytest.raises(BadInput, match=r"model\.backbone\.arch\.x"):
        read_config(arguments(f"{root}/configs/tic_retinanet.py", "--cfg-options", "model.backbone.arch.x=1"))


def test_bases_in_mmseg_are_found(tmp_path):
    (tmp_path / "c.py").write_text('_base_ = "mmseg::_base_/datasets/ade20k.py"\n')
    assert Config.fromfile(tmp_path / "c.py").dataset_type == "ADE20KDataset"


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """What tools/train.py makes of a config's source and of options."""
    monkeypatch.setattr(train, "is_cuda_available", lambda: "--gpu" in options)
    options = []

    def configure(*given, source=""):
        options[:] = given
        (tmp_path / "c.py").write_text(f"{LEAST}\n{source}")
        argv = ["train.py", str(tmp_path / "c.py"), "--work-dir", str(tmp_path / "work")]
        monkeypatch.setattr("sys.argv", [*argv, *(option for option in given if option != "--gpu")])
        return train.configure(train.parse_args())

    return configure


LEAST = """
custom_imports = dict(imports=["tic_backbone.openmmlab"])
model = dict(backbone=dict(type="TiC", arch="nano"))
optim_wrapper = dict(type="OptimWrapper", loss_scale=8.0)
"""


def test_mixed_precision_is_what_was_asked_for(configured):
    option = ("--cfg-options", "optim_wrapper.dtype=bfloat16")
    assert configured(*option).optim_wrapper == dict(type="OptimWrapper", loss_scale=8.0, dtype="bfloat16")
    on_gpu = configured("--gpu", "--amp", *option)
    assert on_gpu.optim_wrapper == dict(type="AmpOptimWrapper", loss_scale=8.0, dtype="bfloat16")
    on_cpu = configured("--amp", *option)
    assert on_cpu.optim_wrapper == dict(type="BFloat16OptimWrapper")
    assert on_cpu.custom_imports.imports == ["tic_backbone.openmmlab", "tic_backbone.engine"]


def test_a_first_run_with_resume_begins_with_load_from(configured, tmp_path):
    for name in ("start", "other"):
        torch.save(dict(state_dict={}), tmp_path / f"{name}.pth")
    load = f"load_from = {str(tmp_path / 'start.pth')!r}"
    cfg = configured("--resume", source=load)
    assert not cfg.get("resume") and cfg.load_from == str(tmp_path / "start.pth")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "other.pth"))
    cfg = configured("--resume", source=load)
    assert cfg.resume and cfg.load_from is None
    cfg = configured("--resume", str(tmp_path / "other.pth"), source=load)
    assert cfg.resume and cfg.load_from == str(tmp_path / "other.pth")


def test_pretrained_keeps_what_else_init_cfg_says(configured):
    cfg = configured("--pretrained", "w.pth", "--cfg-options", "model.backbone.init_cfg.min_matched=0")
    assert cfg.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="w.pth", min_matched=0)


@pytest.mark.parametrize("rgb", [True, False])
@pytest.mark.parametrize(("config", "flag"), [("retinanet", "bgr_to_rgb"), ("classifier", "to_rgb")])
def test_backbones_get_photos_as_their_config_has_them(config, flag, rgb, root, tmp_path):
    wanted = f"dict(mean=[1.0, 20.0, 300.0], std=[1.0, 2.0, 4.0], {flag}={rgb})"
    where = f"data_preprocessor = {wanted}" if config == "classifier" else f"model = dict(data_preprocessor={wanted})"
    (tmp_path / "c.py").write_text(f'_base_ = "{root}/configs/tic_{config}.py"\n{where}\n')
    seen = []
    backbone, run = load_backbone(str(tmp_path / "c.py"))
    backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    photo = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    run(to_tensor(Image.fromarray(photo))[None])
    wanted = (photo if rgb else photo[..., ::-1]) - np.array([1.0, 20, 300])
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0), wanted / [1, 2, 4], atol=1e-3)


def test_a_checkpoint_without_all_of_the_backbone_is_refused(tmp_path):
    weights = load_backbone("tic_nano")[0].state_dict()
    torch.save(weights, tmp_path / "whole.pth")
    load_backbone("tic_nano", str(tmp_path / "whole.pth"))
    del weights["stages.3.1.attn.q.weight"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(BadInput, match=r"part\.pth lacks .*stages\.3\.1\.attn\.q\.weight"):
        load_backbone("tic_nano", str(tmp_path / "part.pth"))
