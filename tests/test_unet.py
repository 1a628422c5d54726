"""The denoiser: shapes, where attention is, what reaches the output, its published size; and the plain DDPM."""
import pytest
import torch
from conftest import generator, randomised
from diffusers import UNet2DModel
from hybridvae.core import Draws, HybridVAEError, count_parameters
from hybridvae.unet import DDPM, EmbeddedBlock, SelfAttention, UNet, from_diffusers, timestep_embedding, to_diffusers

SMALL = dict(image_size=16, width=8, multipliers=(1, 2), attention=(8,))
CONDITIONED = dict(SMALL, cond_channels=3, z_dim=5)


def inputs(unet, n=2, seed=0):
    "x_t, t, cond and z for this network, None where it takes none."
    g, c = generator(seed), unet.config
    size = c["image_size"]
    image = lambda channels: torch.randn(n, channels, size, size, generator=g) if channels else None
    z = torch.randn(n, c["z_dim"], generator=g) if c["z_dim"] else None
    return image(c["channels"]), torch.randint(1000, (n,), generator=g), image(c["cond_channels"]), z


@pytest.mark.parametrize("options", [
    {}, dict(channels=1), dict(cond_channels=3), dict(z_dim=5), dict(patch=2, attention=(4,)), dict(blocks=3),
    dict(multipliers=(1, 2, 2), attention=(16, 4)), dict(channels=2, cond_channels=4, patch=2, attention=(), z_dim=1),
    dict(image_size=32, attention=(32,))], ids=str)
def test_the_prediction_has_the_shape_of_the_image(options):
    unet = randomised(UNet(**{**SMALL, **options}))
    x, *rest = inputs(unet)
    out = unet(x, *rest)
    assert out.shape == x.shape and out.isfinite().all() and out.abs().max() > 0


def test_it_starts_by_predicting_zero():
    unet = UNet(**CONDITIONED)
    assert unet(*inputs(unet)).abs().max() == 0


def attention_sizes(unet):
    "Height of every feature map that attention sees in one pass."
    seen = []
    for module in unet.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[-1]))
    unet(*inputs(unet))
    return seen


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("attention", [(), (32,), (16,), (8,), (32, 8), (32, 16, 8)], ids=str)
def test_attention_is_at_the_named_resolutions_and_nowhere_else(attention, blocks):
    unet = UNet(image_size=32, width=8, multipliers=(1, 1, 1), blocks=blocks, attention=attention)
    want = [size for size in attention for _ in range(2 * blocks + 1 + (size == 8))]  # down, up, and the middle at 8
    assert sorted(attention_sizes(unet)) == sorted(want)


def test_a_patch_counts_in_the_resolution():
    assert attention_sizes(UNet(image_size=32, width=8, multipliers=(1, 1), attention=(16,), patch=2)) == [16] * 3


@pytest.mark.parametrize("options, words", [
    (dict(attention=(12,)), "attention at .12.: choose from the resolutions .16, 8."),
    (dict(attention=(16, 4)), "choose from the resolutions"),
    (dict(image_size=15, attention=()), "image_size 15 does not divide"),
    (dict(image_size=18, attention=(), patch=4), "does not divide by patch 4"),
    (dict(image_size=18, attention=(), multipliers=(1, 1, 1)), "2 halvings")])
def test_resolutions_that_do_not_occur_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        UNet(**{**SMALL, **options})


def test_attention_is_the_weighted_mean_of_values():
    "Against the definition, head by head."
    layer = randomised(SelfAttention(8, head_width=4), scale=0.7)
    x = torch.randn(2, 8, 3, 3, generator=generator())
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, places)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = (q[:, h].transpose(1, 2) @ k[:, h] / 2).softmax(dim=-1)  # √d = 2
        heads.append(v[:, h] @ weights.transpose(1, 2))
    want = x + layer.out(torch.cat(heads, dim=1).reshape(x.shape))
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


# --- what reaches the output ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("patch", [1, 2])
def test_every_channel_of_image_and_condition_and_every_number_of_the_code_reaches_the_output(patch):
    unet = randomised(UNet(**dict(CONDITIONED, patch=patch, attention=(16 // patch // 2,))))
    x, t, cond, z = inputs(unet)
    before = unet(x, t, cond, z)
    for original, where in ((x, 0), (cond, 2), (z, 3)):
        for k in range(original.shape[1]):
            changed = [x, t, cond, z]
            changed[where] = original.clone()
            changed[where][:, k] += 1
            difference = (unet(*changed) - before).flatten(1).abs().mean(dim=1)
            assert (difference > 1e-3).all(), f"input {where}, element {k}"


def test_the_timestep_reaches_the_output_for_every_single_step():
    unet = randomised(UNet(**SMALL))
    x = inputs(unet, n=1)[0].expand(50, -1, -1, -1)
    out = unet(x, torch.arange(950, 1000))
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(out[1:], out))


def test_each_image_has_its_own_time_condition_and_code():
    unet = randomised(UNet(**CONDITIONED))
    together = unet(*inputs(unet, n=3))
    for i in range(3):
        alone = unet(*(v[i:i + 1] for v in inputs(unet, n=3)))
        torch.testing.assert_close(alone, together[i:i + 1], rtol=1e-4, atol=1e-4)


def test_the_code_scales_and_shifts_every_block():
    "Latent-code guidance is added to the time embedding: each block's modulation must change with z."
    unet = randomised(UNet(**CONDITIONED))
    blocks, seen = [m for m in unet.modules() if isinstance(m, EmbeddedBlock)], {}
    for block in blocks:
        block.modulation.register_forward_hook(lambda m, args, out: seen.setdefault(m, []).append(out))
    x, t, cond, z = inputs(unet)
    unet(x, t, cond, z)
    unet(x, t, cond, z + 1)
    assert len(seen) == len(blocks) == 8  # in each of two levels one down and two up, and two in the middle
    assert all(((a - b).abs() > 1e-6).all() for a, b in seen.values())


def test_every_parameter_is_used():
    unet = randomised(UNet(**CONDITIONED)).train()
    unet(*inputs(unet)).square().sum().backward()
    unused = [name for name, p in unet.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert unused == []


def test_dropout_acts_in_training_only():
    unet = randomised(UNet(**SMALL, dropout=0.5))
    assert torch.equal(unet(*inputs(unet)), unet(*inputs(unet)))
    unet.train()
    assert not torch.equal(unet(*inputs(unet)), unet(*inputs(unet)))


def test_the_time_embedding_is_that_of_the_paper():
    t = torch.tensor([0, 1, 999])
    found = timestep_embedding(t, 8)
    for k in range(4):
        angle = t.double() / 10_000 ** (k / 4)
        torch.testing.assert_close(found[:, k].double(), angle.cos(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, 4 + k].double(), angle.sin(), rtol=1e-4, atol=1e-4)


# --- size -----------------------------------------------------------------------------------------------------------

def test_the_published_cifar10_network_has_its_published_size():
    """Ho et al. (2020) state 35.7 million parameters for CIFAR-10; their network, built with diffusers, has 35,746,307.

    Two differences are meant, and account for all of the rest: the embedding also *scales* features (theirs only shifts
    them), and attention in the middle, at 4 x 4, is there only where it is asked for.
    """
    with torch.device("meta"):
        unet = UNet(image_size=32, width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.3)
        middle_attention = count_parameters(SelfAttention(256, 64))
    embedding = 4 * 128
    scales = sum(m.conv2.out_channels * (embedding + 1) for m in unet.modules() if isinstance(m, EmbeddedBlock))
    assert count_parameters(unet) - scales + middle_attention == 35_746_307


# --- DDPM -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ddpm():
    return randomised(DDPM(unet=SMALL, diffusion=dict(schedule="linear", prediction="eps", weighting="simple")))


def test_the_ddpm_loss_is_the_error_of_the_noise_it_drew(ddpm):
    x, draws = torch.rand(4, 3, 16, 16, generator=generator()) * 2 - 1, Draws(0, 0)
    t = draws.randint(1000, 4)
    eps = draws.randn(4, 3, 16, 16)
    abar = torch.tensor(ddpm.diffusion.alphas_cumprod).float()[t][:, None, None, None]
    out = ddpm.unet(abar.sqrt() * x + (1 - abar).sqrt() * eps, t)
    terms = ddpm.training_loss(x, draws=Draws(0, 0))
    torch.testing.assert_close(terms["loss"], (out - eps).square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["loss_per_image"], terms["loss"] * 3 * 16 * 16)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp"])
def test_ddpm_samples_follow_the_generator_and_stay_in_range(ddpm, sampler):
    def draw(seed):
        return ddpm.sample(2, sampler=sampler, steps=4, generator=generator(seed))
    x = draw(0)
    assert x.shape == (2, 3, 16, 16) and x.abs().max() <= 1 and not x.requires_grad
    assert torch.equal(x, draw(0)) and not torch.equal(x, draw(1)) and not torch.equal(x[0], x[1])


def test_a_ddpm_config_builds_the_same_model(ddpm):
    again = DDPM.from_config(ddpm.config)
    assert again.config == ddpm.config
    again.load_state_dict(ddpm.state_dict())
    x = torch.rand(2, 3, 16, 16, generator=generator())
    a, b = (m.training_loss(x, draws=Draws(0, 0))["loss"] for m in (again, ddpm))
    assert torch.equal(a, b)


@pytest.mark.parametrize("patch", [1, 2])
def test_every_convolution_meets_images_with_channels_last(patch):
    "A layer that hands on another memory layout makes all that follow rearrange it: right, and slow."
    net = UNet(image_size=16, width=16, multipliers=(1, 2), attention=(8 // patch,), head_width=8, patch=patch)
    net, layouts = net.to(memory_format=torch.channels_last), {}
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs, name=name: layouts.update({name: inputs[0]}))
    net(torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.zeros(2))
    last = {name: x.is_contiguous(memory_format=torch.channels_last) for name, x in layouts.items()}
    assert len(last) > 10 and all(last.values()), last


def test_the_middle_attends_where_it_is_asked_to():
    "Whatever resolutions are named; weights of before, without the key, are built as they were."
    build = lambda **options: UNet(image_size=16, width=8, multipliers=(1, 2), **options)
    attends = lambda unet: isinstance(unet.middle[0][1], SelfAttention)
    assert attends(build(attention=(), middle=True)) and attends(build(attention=(8,)))
    assert not attends(build(attention=(16,)))
    old = {k: v for k, v in build(attention=(16,)).config.items() if k != "middle"}
    assert UNet(**old).state_dict().keys() == build(attention=(16,)).state_dict().keys()
    unet, x, z = build(attention=(), middle=True), torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    assert unet(x, z).shape == x.shape


# --- diffusers ------------------------------------------------------------------------------------------------------

EQUAL_GROUPS = dict(image_size=16, width=128, multipliers=(1, 2), attention=(8,), head_width=32)  # 32 groups everywhere


@pytest.mark.parametrize("options", [
    {}, dict(attention=(16,), blocks=2), dict(attention=(), channels=1), dict(attention=(), middle=True),
    dict(multipliers=(1, 1, 2), attention=(8, 4))], ids=str)
def test_the_network_in_diffusers_computes_the_same_and_comes_back(options):
    unet = randomised(UNet(**EQUAL_GROUPS | options), scale=0.05).eval()
    theirs = to_diffusers(unet)
    x, t, *_ = inputs(unet)
    want = unet(x, t)
    assert want.std() > 0.01 and not theirs.training
    torch.testing.assert_close(theirs(x, t).sample, want, rtol=1e-5, atol=1e-5)
    again = from_diffusers(theirs)
    assert again.config == unet.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("options", [dict(cond_channels=3), dict(z_dim=4), dict(patch=2, attention=(4,)),
                                     dict(width=64), dict(head_width=48)], ids=str)
def test_a_network_that_diffusers_does_not_have_is_refused(options):
    with pytest.raises(HybridVAEError, match="diffusers has no such U-Net"), torch.device("meta"):
        to_diffusers(UNet(**EQUAL_GROUPS | options))


@pytest.mark.parametrize("options", [dict(resnet_time_scale_shift="default"), dict(flip_sin_to_cos=False, freq_shift=1),
                                     dict(downsample_padding=0), dict(norm_eps=1e-6)], ids=str)
def test_a_model_of_diffusers_that_computes_otherwise_is_refused(options):
    config = dict(to_diffusers(UNet(**EQUAL_GROUPS)).config) | options
    with pytest.raises(HybridVAEError, match="computes otherwise than a UNet: ") as error:
        from_diffusers(UNet2DModel.from_config(config))
    assert all(f"{name}={value!r}" in str(error.value) for name, value in options.items())
