"""Do the tests bite? Deliberate faults, one line each, applied one by one to a copy of the tree; some test must fail.

    python tests/faults.py                    all that are not known to be killed yet; hours at most, CSV as it goes
    python tests/faults.py --quick            only the tests that should kill each, first; minutes
    python tests/faults.py --only ema,vlb     faults whose file or description has one of these words
    python tests/faults.py --list             what they are
    python tests/faults.py --check            is every old text still there, exactly once?

Not part of `pytest test_all.py`, which only asks for --check. Each fault names the tests that should kill it (-k);
if they pass, the whole suite is run up to its first failure. A fault that lives is a missing test, or is EQUIVALENT:
then the reason stands beside it. The Python that imports torch is forked for every fault, which saves its start.
"""

# ruff: noqa: E501 - a fault is one line
import argparse
import csv
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
COLUMNS = ["fault", "result", "killed by", "seconds"]


class Fault(NamedTuple):
    file: str
    why: str  # what is wrong with it, in words
    old: str  # occurs exactly once in the file
    new: str
    first: str  # -k of the tests that should kill it

    @property
    def name(self):
        return f"{self.file}: {self.why}"


FAULTS = [Fault(*words) for words in [
    # -- schedule.py
    ("schedule.py", "shift counted once, not twice", "+ 2 * math.log(self.shift)", "+ math.log(self.shift)", "test_schedule"),
    ("schedule.py", "derivative off by a factor", "return -2 * math.pi * self.w /", "return -math.pi * self.w /", "test_schedule"),
    ("schedule.py", "ends of the schedule swapped", "math.exp(-log_snr_max / 2))", "math.exp(log_snr_max / 2))", "test_schedule"),
    ("schedule.py", "alpha and sigma swapped", "return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()", "return torch.sigmoid(-log_snr).sqrt(), torch.sigmoid(log_snr).sqrt()", "test_schedule"),
    ("schedule.py", "alpha is not a square root", "return torch.sigmoid(log_snr).sqrt(), ", "return torch.sigmoid(log_snr), ", "test_schedule"),
    ("schedule.py", "posterior's shares swapped", "((1 - c) / alpha_t * z_t + c * e)", "(c / alpha_t * z_t + (1 - c) * e)", "one_step_back"),
    ("schedule.py", "a step of no length may be no number", ".clamp(min=0)", "", "one_step_back"),
    ("schedule.py", "posterior's noise of time t", "sigma_s * c.sqrt()", "sigma_s * c", "one_step_back"),
    ("schedule.py", "a shift of 0 is accepted", "if not shift > 0:", "if shift < 0:", "bad_input"),
    # -- embedding_diffusion.py
    ("embedding_diffusion.py", "table of mean square D", "F.rms_norm(table, table.shape[-1:], eps=1e-8)", "F.normalize(table, dim=-1)", "collapse_diag"),
    ("embedding_diffusion.py", "scale without 1 +", "h, 1 + scale[:, None])", "h, scale[:, None])", "network_by_hand"),
    ("embedding_diffusion.py", "adaLN not zero at the start", "nn.init.zeros_(layer.weight)\n", "nn.init.normal_(layer.weight, std=0.02)\n", "new_denoiser"),
    ("embedding_diffusion.py", "a head that is not zero at the start", "+ [self.final_modulation, self.head]:", "+ [self.final_modulation]:", "new_denoiser"),
    ("embedding_diffusion.py", "columns missing in the initial positions", "columns.reshape(-1, 1) * frequency], 1)", "rows.reshape(-1, 1) * frequency], 1)", "new_denoiser"),
    ("embedding_diffusion.py", "activation checkpointing does nothing", "if self.recompute and torch.is_grad_enabled():", "if False:", "test_recomputation"),
    ("embedding_diffusion.py", "class is not told", "+ self.class_embedding(labels))", "+ self.class_embedding(0 * labels))", "network_by_hand"),
    ("embedding_diffusion.py", "noise level is not told", "frequency = torch.exp(torch.linspace(math.log(0.01), math.log(4.0), 64, device=log_snr.device))", "frequency = torch.zeros(64, device=log_snr.device)", "network_by_hand"),
    ("embedding_diffusion.py", "output prior without |E|^2", "-table.square().sum(1, keepdim=True) / 2]", "0 * table.square().sum(1, keepdim=True) / 2]", "monte_carlo_bound"),
    ("embedding_diffusion.py", "output prior sees dropped positions", "(~mask[..., None]).to(own.dtype)", "torch.ones_like(mask[..., None]).to(own.dtype)", "test_dropping"),
    ("embedding_diffusion.py", "the posterior's mean is not seen", "inputs = torch.cat([z, own.softmax(-1) @ table], dim=-1)", "inputs = torch.cat([z, z], dim=-1)", "network_by_hand"),
    ("embedding_diffusion.py", "the network sees dropped positions", "h = torch.where(mask[..., None], self.mask_embedding.to(h.dtype), h)", "h = h + 0 * self.mask_embedding.to(h.dtype)", "test_dropping"),
    ("embedding_diffusion.py", "no positions", "h = h + self.position\n", "h = h + 0 * self.position\n", "network_by_hand"),
    ("embedding_diffusion.py", "guidance off by one", "return (1 + guidance) * conditional - guidance * unconditional", "return guidance * conditional - (guidance - 1) * unconditional", "guidance"),
    ("embedding_diffusion.py", "guidance from the labels themselves", "null = torch.full_like(labels, self.num_classes)", "null = torch.full_like(labels, 0)", "guidance"),
    ("embedding_diffusion.py", "codebook's start is whitened", "components = (U * S.sqrt())[:, :self.D]", "components = U[:, :self.D]", "init_from_codebook"),
    ("embedding_diffusion.py", "keys are not normalised", "q, k = (F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in (q, k))", "q = F.rms_norm(q, q.shape[-1:], eps=1e-6)", "network_by_hand"),
    ("embedding_diffusion.py", "the weight of the keys' norm is ignored", "q * (self.q_norm.weight * self.k_norm.weight)", "q * self.q_norm.weight", "network_by_hand"),
    ("embedding_diffusion.py", "the MLP's gate is that of attention", "torch.addcmul(h, gate2[:, None],", "torch.addcmul(h, gate1[:, None],", "network_by_hand"),
    # -- losses.py
    ("losses.py", "times are not stratified", "torch.arange(count, device=device) / count) % 1", "0 * torch.arange(count, device=device) / count) % 1", "times_cover"),
    ("losses.py", "L_prior without its constant", "- D * log_sigma2)", "+ D * log_sigma2)", "prior_loss"),
    ("losses.py", "weight of L_diff without the half", "weight = -0.5 * d_log_snr", "weight = -d_log_snr", "bpsk or bound"),
    ("losses.py", "weight is not clipped", ".clamp(max=weight_clip)", ".clamp(max=math.inf)", "three_steps"),
    ("losses.py", "L_CM the other way round", "return (q * (log_q - logits.log_softmax(-1))).sum(-1)", "return (logits.softmax(-1) * (logits.log_softmax(-1) - log_q)).sum(-1)", "bpsk"),
    ("losses.py", "L_CM without the teacher's entropy", "(q * (log_q - logits.log_softmax(-1)))", "(q * -logits.log_softmax(-1))", "bpsk"),
    ("losses.py", "the table's gradient through z_s", "z_t, e = z_t.detach(), e.detach()", "z_t, e = z_t.detach(), e", "noise_of_a_batch"),
    ("losses.py", "markov for shared", 'if cm_pairs == "shared":', 'if cm_pairs != "shared":', "markov"),
    ("losses.py", "drop rate per token", "rate = max_drop_rate * torch.rand(B, 1,", "rate = max_drop_rate * torch.rand(B, N,", "noise_of_a_batch"),
    ("losses.py", "label drop ignored", "labels = torch.where(drop, model.num_classes, labels)", "labels = torch.where(drop, labels, labels)", "noise_of_a_batch"),
    ("losses.py", "max_gap ignored", "least = (t - max_gap).clamp(min=0)", "least = (t - 1.0).clamp(min=0)", "noise_of_a_batch"),
    ("losses.py", "s in the whole interval", "s = least + (t - least) *", "s = least + (1 - least) *", "noise_of_a_batch"),
    ("losses.py", "L_diff divided by all tokens", "kept, torch.full_like(kept, (B - n_rec) * N)])", "torch.full_like(kept, (B - n_rec) * N), torch.full_like(kept, (B - n_rec) * N)])", "noise_of_a_batch"),
    ("losses.py", "L_CM divided by all rows", "kept, torch.full_like(kept, (B - n_rec) * N)])", "kept, torch.full_like(kept, B * N)])", "noise_of_a_batch"),
    ("losses.py", "L_rec divided by all rows", "torch.stack([torch.full_like(kept, n_rec * N)", "torch.stack([torch.full_like(kept, B * N)", "noise_of_a_batch"),
    ("losses.py", "w_rec and w_diff swapped", "return w_rec * terms[0] + w_diff * terms[1]", "return w_diff * terms[0] + w_rec * terms[1]", "three_steps"),
    ("losses.py", "w_cm ignored", "+ w_cm * terms[2]", "+ terms[2]", "three_steps"),
    ("losses.py", "dropped positions count in L_diff", "diff = (diff * ~mask[n_rec:]).sum()", "diff = diff.sum()", "test_dropping"),
    ("losses.py", "the teacher sees all", "labels[n_rec:], mask=mask[n_rec:], table=table.detach())", "labels[n_rec:], mask=None, table=table.detach())", "test_dropping"),
    ("engine/distributed.py", "freed memory is given back", "mallopt(-3, 32 * 2 ** 20)", "mallopt(-3, 2 ** 17)", "freed_memory"),
    ("losses.py", "the teacher at the student's time", "teacher_logits = teacher(z_s, log_snr_s,", "teacher_logits = teacher(z_s, log_snr[n_rec:],", "three_steps"),
    ("losses.py", "the student is not told of the mask", "logits = model(z_t, log_snr, labels, mask=mask, table=table)", "logits = model(z_t, log_snr, labels, table=table)", "test_dropping"),
    ("losses.py", "table detached in e_hat", "e_hat = logits.softmax(-1) @ table                                                         # (B', N, D)", "e_hat = logits.softmax(-1) @ table.detach()", "gradients_of"),
    ("losses.py", "the bound has a clipped weight", "weight_clip=math.inf)          # (B, N)", "weight_clip=5.0)          # (B, N)", "monte_carlo"),
    ("losses.py", "the bound with the null class", "logits = model(add_noise(e, log_snr_0, eps_0), log_snr_0, labels, table=table)", "logits = model(add_noise(e, log_snr_0, eps_0), log_snr_0, labels * 0 + model.num_classes, table=table)", "bound_by_hand"),
    ("losses.py", "the bound's diffusion term with the null class", "logits = model(add_noise(e, log_snr, eps), log_snr, labels, table=table)", "logits = model(add_noise(e, log_snr, eps), log_snr, labels * 0 + model.num_classes, table=table)", "bound_by_hand"),
    ("losses.py", "the bound on the first 256 images", "order = (torch.arange(max(draws, len(x)), device=x.device) % len(x)).split(batch)", "order = (torch.arange(max(draws, len(x)), device=x.device) % min(len(x), 256)).split(batch)", "bound_by_hand or three_steps"),
    ("losses.py", "standard error is the deviation", "total.std() / len(total) ** 0.5", "total.std()", "bound_by_hand"),
    ("losses.py", "bits are nats", "parts.cpu().double() / math.log(2)", "parts.cpu().double()", "bound_by_hand"),
    ("losses.py", "effective rank not centred", "torch.linalg.svdvals(table - table.mean(0)).square()", "torch.linalg.svdvals(table).square()", "collapse_diag"),
    ("losses.py", "effective rank of singular values", "torch.linalg.svdvals(table - table.mean(0)).square()", "torch.linalg.svdvals(table - table.mean(0))", "collapse_diag"),
    ("losses.py", "smallest distance is the mean", "smallest = min(smallest, float(block.min()))", "smallest = float(block[block < math.inf].mean())", "collapse_diag"),
    ("losses.py", "distances between blocks count once", "+ 2 * float(block[:, 1024:].sum())", "+ float(block[:, 1024:].sum())", "large_table"),
    ("losses.py", "distances of the first block alone", "for start in range(0, K, 1024):", "for start in range(0, min(K, 1024), 1024):", "large_table"),
    ("losses.py", "fewer chunks of a batch with fewer rows", "max(len(x), padded)", "len(x)", "bound_in_chunks"),
    ("embedding_diffusion.py", "the parameter itself as the table", "return table.clone()", "return table", "large_table"),
    ("engine/prepare.py", "FSDP with an old torch", 'torch.__version__ < "2.8"', 'torch.__version__ < "2.0"', "passes_and"),
    ("engine/distributed.py", "another GPU is asked for its memory", "torch.cuda.set_device(device)  # what", "device  # what", "gpu_by_number"),
    # -- the price of a run, and its best checkpoint
    ("engine/best.py", "every small rise is one", "RISE, TWICE = 4, 2", "RISE, TWICE = 1, 1", "best_says"),
    ("engine/best.py", "the worst network is kept", "or mean < 0:", "or mean > 0:", "best_says or best_checkpoint"),
    ("extras/meta_count.py", "what was freed still counts", "self.now[kind] -= size", "self.now[kind] -= 0", "price_of_the"),
    ("extras/meta_count.py", "norms in bfloat16", '"rms_norm": torch.float32}', '"rms_norm": torch.bfloat16}', "price_has"),
    ("extras/price.py", "gradients of the last step are forgotten", "p.grad = torch.zeros_like(p)", "p.grad = p.data", "price_of_the_tokenizer"),
    ("engine/prepare.py", "the chosen batch is not used", "run.micro_batch or share", "share", "price_makes"),
    ("engine/config.py", "presets look at no number", "if by_size and by_number", "if False and by_number", "presets_suit"),
    # -- sample.py
    ("sample.py", "ancestral without noise", "return mean + std * eps\n", "return mean\n", "one_step_back"),
    ("sample.py", "DDIM with the noise of time t", "alpha_s[:, None, None] * e_hat + sigma_s[:, None, None] * eps_hat", "alpha_s[:, None, None] * e_hat + sigma_t[:, None, None] * eps_hat", "one_step_back"),
    ("sample.py", "the early end for many steps too", "if 1 < steps < 16 else 0.0", "if 1 < steps else 0.0", "sampling_options"),
    ("sample.py", "guided steps end like others", "0.3 if guidance > 0 else", "0.3 if guidance > 1 else", "sampling_options"),
    ("sample.py", "temperature multiplied", "(logits if temperature == 1 else logits / temperature)", "(logits if temperature == 1 else logits * temperature)", "sampling_options"),
    ("sample.py", "guidance outside of its interval", "omega = guidance if interval[0] <= t <= interval[1] else 0.0", "omega = guidance", "sampling_options"),
    ("sample.py", "known tokens are drawn", "p = torch.where(inpaint[..., None] < 0, p, one_hot)", "p = torch.where(inpaint[..., None] < -1, one_hot, p)", "inpainted or known_tokens"),
    ("sample.py", "known tokens not kept at the last draw", "if inpaint is not None:\n            p =", "if inpaint is not None and i + 1 < steps:\n            p =", "known_tokens"),
    ("sample.py", "images share their later noise", "random(model.N, model.D))", "random(model.N, model.D)[:1])", "batch_size_never or follow"),
    ("sample.py", "draws the likeliest token", "u = random(model.N, 1, source=torch.rand) ", "u = 0 * random(model.N, 1, source=torch.rand) + 0.5 ", "follow"),
    ("sample.py", "grid of times ends too early", "times = torch.linspace(start, end, steps, dtype=torch.float64)", "times = torch.linspace(start, end, steps + 1, dtype=torch.float64)[:-1]", "sampling_options"),
    ("sample.py", "every batch draws the first images", "image_generators(seed, indices[here])", "image_generators(seed, indices[:len(labels[here])])", "every_flag_of_sample"),
    ("sample.py", "the rows of processes overlap", "mine = labels[(torch.arange(each) + rank * each).clamp(max=n - 1)]", "mine = labels[torch.arange(each).clamp(max=n - 1)]", "shares_of_two"),
    ("sample.py", "raw weights are loaded", 'lambda: EmbeddingDiffusion(**config["denoiser"]), checkpoint["ema"])', 'lambda: EmbeddingDiffusion(**config["denoiser"]), checkpoint["model"])', "three_steps"),
    # -- vqvae.py
    ("vqvae.py", "nearest code without its length", "(codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)", "(-2 * z @ codebook.T).argmin(1)", "nearest_and_ema"),
    ("vqvae.py", "no straight-through gradient", "z_q = z + (z_q - z).detach()", "z_q = z_q", "vq_gradients"),
    ("vqvae.py", "commitment trains the codes", "commitment = (z - z_q.detach()).square().mean()", "commitment = (z - z_q).square().mean()", "vq_gradients"),
    ("vqvae.py", "codebook loss trains the encoder", "codebook = (z.detach() - z_q).square().mean()", "codebook = (z - z_q).square().mean()", "vq_gradients"),
    ("vqvae.py", "no k-means rounds", "for _ in range(10):\n            nearest", "for _ in range(0):\n            nearest", "start_of_the_codebook"),
    ("vqvae.py", "codes start at random", "self.codebook.data.copy_(codes)\n        self.running_count.fill_", "self.running_count.fill_", "start_of_the_codebook"),
    ("vqvae.py", "running sum forgotten at the start", "self.running_sum.copy_(codes * self.running_count[:, None])", "pass", "start_of_the_codebook"),
    ("vqvae.py", "decay for the counts is another", "self.running_count.lerp_(counts, 1 - self.decay)", "self.running_count.lerp_(counts, self.decay)", "nearest_and_ema"),
    ("vqvae.py", "sums of one process only", "all_reduce_sum([counts, sums])", "all_reduce_sum([counts])", "one_codebook"),
    ("vqvae.py", "restarts uniform instead of by distance", "error = (z - codes[nearest_codes(z, codes)]).square().sum(1).cpu() + 1e-12", "error = torch.ones(len(z))", "where_dead"),
    ("vqvae.py", "restarts that coincide", "replacement=len(z) < self.K, generator", "replacement=True, generator", "where_dead"),
    ("vqvae.py", "fresh codes die at the next look", "count = torch.where(dead, 0.5 * mean_count, self.running_count)", "count = self.running_count.clone()", "dead"),
    ("vqvae.py", "l1 and l2 swapped", 'if kind == "l2" else F.l1_loss', 'if kind == "l1" else F.l1_loss', "a_step_of_the_tokenizer"),
    ("vqvae.py", "perceptual loss not in the loss", 'loss = loss + config["perceptual"] * losses["lpips"]', 'loss = loss + 0 * losses["lpips"]', "a_step_of_the_tokenizer"),
    ("vqvae.py", "the decoder helps the discriminator", 'losses["adversarial"] = -discriminator(x_hat).mean()', 'losses["adversarial"] = discriminator(x_hat).mean()', "a_step_of_the_tokenizer"),
    ("vqvae.py", "discriminator's weight without ramp", 'config["gan"] * ramp * losses["weight"]', 'config["gan"] * losses["weight"]', "a_step_of_the_tokenizer"),
    ("vqvae.py", "the decoder sees the discriminator at once", 'done >= config["gan_start"] + GAN_WARMUP:', 'done >= config["gan_start"]:', "a_step_of_the_tokenizer"),
    ("vqvae.py", "beta ignored", 'loss = loss + config["beta"] * outputs["commitment"]', 'loss = loss + outputs["commitment"]', "a_step_of_the_tokenizer"),
    ("vqvae.py", "codebook not trained under gradient", 'loss = loss + outputs["codebook"]\n', 'loss = loss + 0 * outputs["codebook"]\n', "a_step_of_the_tokenizer"),
    ("vqvae.py", "real and fake swapped", "hinge_loss(judged(x), judged(x_hat.detach()))", "hinge_loss(judged(x_hat.detach()), judged(x))", "a_step_of_the_tokenizer"),
    ("vqvae.py", "the discriminator at the decoder's rate", 'parts["discriminator_optimizer"], gan_lr, config', 'parts["discriminator_optimizer"], lr, config', "a_step_of_the_tokenizer"),
    ("vqvae.py", "pixels are not rounded", "((images + 1) * 127.5).round().clamp", "((images + 1) * 127.5).clamp", "vqvae_shapes"),
    ("vqvae.py", "residual blocks are not the identity at the start", "nn.init.zeros_(self.branch[-1].weight)", "nn.init.normal_(self.branch[-1].weight, std=0.02)", "new_denoiser"),
    # -- train.py
    ("train.py", "no warm-up", "return peak * min(1, (step + 1) / (warmup + 1)) *", "return peak *", "learning_rates"),
    ("train.py", "the rate does not fall to zero", "math.cos(math.pi * step / steps))", "math.cos(math.pi * step / steps / 2))", "learning_rates"),
    ("train.py", "clipping missing in stage 3", "norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)", "norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)", "three_steps"),
    ("train.py", "gradients are never cleared", "    optimizer.zero_grad(set_to_none=True)\n    torch._foreach", "    torch._foreach", "three_steps"),
    ("train.py", "EMA is the weights", "[p.detach() for p in model.parameters()], 1 - decay)", "[p.detach() for p in model.parameters()], 1)", "three_steps"),
    ("train.py", "EMA's memory is not short at the start", 'decay = min(config["ema_decay"], (1 + step) / (10 + step))', 'decay = config["ema_decay"]', "three_steps"),
    ("train.py", "the teacher is always the model", 'teacher = ema if config["teacher"] == "ema" else model', "teacher = model", "three_steps"),
    ("train.py", "bound, pictures and checkpoint of raw weights", "pipeline = make_pipeline(tokenizer, ema, schedule, device", "pipeline = make_pipeline(tokenizer, model, schedule, device", "three_steps"),
    ("train.py", "the bound on training images", "tokens, held_out = read_tokens(run.out / \"tokens.npy\", tokenizer, run.source.class_names, device)", "tokens, held_out = read_tokens(run.out / \"tokens.npy\", tokenizer, run.source.class_names, device); held_out = tokens.batch(np.arange(len(tokens)))", "three_steps"),
    ("train.py", "EMA weights swapped in the checkpoint", '"model": model.state_dict(), "optimizer"', '"model": pipeline.model.state_dict(), "ema": model.state_dict(), "optimizer"', "three_steps"),
    ("train.py", "the same batch at each step", 'batch_indices(len(tokens), config["batch"], seed, "diffusion", step)', 'batch_indices(len(tokens), config["batch"], seed, "diffusion", 0)', "three_steps"),
    ("train.py", "the same noise at each step", 'generator_for(seed, "diffusion", step, device)', 'generator_for(seed, "diffusion", 0, device)', "three_steps"),
    ("train.py", "weight decay ignored", 'weight_decay=config["weight_decay"],', "weight_decay=0.0,", "three_steps"),
    ("train.py", "betas of another optimizer", "optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99),", "optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999),", "three_steps"),
    ("train.py", "codes restart at every step", "if step % RESTART_EVERY == RESTART_EVERY - 1 and step < last_restart:", "if step < last_restart:", "steps_of_the_tokenizers"),
    ("train.py", "codes restart to the end", "last_restart = parts[\"tokenizer\"], 0.75 * steps", "last_restart = parts[\"tokenizer\"], steps", "steps_of_the_tokenizers"),
    ("train.py", "a continued run's rate starts anew", "lr = learning_rate(step - begin, steps - begin,", "lr = learning_rate(step, steps,", "raising_the_steps"),
    # -- data.py and extras/ on data
    ("data.py", "crop at the top", "(image.width - side) // 2, (image.height - side) // 2", "(image.width - side) // 2, 0", "cropped_and"),
    ("data.py", "crop at the left", "(image.width - side) // 2, (image.height - side) // 2", "0, (image.height - side) // 2", "cropped_and or load_image"),
    ("data.py", "palette transparency lost", 'image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:', 'image.mode in ("RGBA", "LA", "PA"):', "cropped_and"),
    ("data.py", "grey with alpha lost", 'image.mode in ("RGBA", "LA", "PA") or', 'image.mode in ("RGBA", "PA") or', "cropped_and"),
    ("data.py", "transparent over black", 'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")', "load_image"),
    ("extras/archives.py", "JPEGs decoded too small", 'image.draft("RGB", (2 * size, 2 * size))', 'image.draft("RGB", (size // 2, size // 2))', "cropped_and"),
    ("data.py", "no EXIF rotation", "ImageOps.exif_transpose(image, in_place=True)", "pass", "load_image"),
    ("data.py", "16 bits of grey are clipped", "np.float32) / 257).round()", "np.float32) / 1).round()", "load_image"),
    ("data.py", "held-out images are trained on", "train, test = np.delete(train, held_out), np.asarray(train)[held_out]", "train, test = np.asarray(train), np.asarray(train)[held_out]", "test_splits"),
    ("data.py", "every second image is held out", "every = max(20, len(train) // 2000)", "every = 2", "test_splits"),
    ("data.py", "the replacement of any class", "alike = torch.nonzero(self.labels == self.labels[i]).flatten().tolist()", "alike = list(range(len(self.labels)))", "takes_the_place"),
    ("extras/toy.py", "held-out images are training images", "for n, seed in ((self.n_train, 0), (self.n_test, 1)):", "for n, seed in ((self.n_train, 0), (self.n_test, 0)):", "test_splits"),
    ("extras/toy.py", "classes in blocks", "labels = np.arange(n) % len(shapes)", "labels = np.arange(n) * len(shapes) // n", "test_toy"),
    ("extras/data_forms.py", "classes of the test folder count", "class_names = classes_of([names[i] for i in train])", "class_names = classes_of(names)", "layouts"),
    ("extras/data_arrays.py", "labels of all images are 0", "labels = np.concatenate([np.zeros(len(a), np.int64) if given is None else", "labels = np.concatenate([np.zeros(len(a), np.int64) if True else", "test_forms"),
    ("extras/data_arrays.py", "CIFAR's rows are not channels first", "reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)", "reshape(-1, 32, 32, 3)", "test_forms"),
    # -- fid.py and what belongs to it
    ("fid.py", "means are left out", "distance = np.square(mu1 - mu2).sum() + np.trace", "distance = np.trace", "frechet_distance"),
    ("fid.py", "the trace counts once", "- 2 * trace\n", "- trace\n", "frechet_distance"),
    ("fid.py", "covariance divided by n", "/ (images.n - 1)", "/ images.n", "test_measure"),
    ("fid.py", "kept features are the first ones", "kept[np.linspace(0, images.n - 1, min(keep, images.n)).astype(int)] = True", "kept[:min(keep, images.n)] = True", "test_measure"),
    ("fid.py", "sFID is FID", 'frechet_distance(real.mean["spatial"], real.cov["spatial"],', 'frechet_distance(real.mean["2048"], real.cov["2048"],', "which_score or fid_program"),
    ("fid.py", "precision and recall swapped", 'scores["precision"], scores["recall"] = precision_recall(f1, f2)', 'scores["recall"], scores["precision"] = precision_recall(f1, f2)', "which_score"),
    ("fid.py", "precision and recall swapped in the report", '("precision", "precision", 4), ("recall", "recall", 4))', '("recall", "precision", 4), ("precision", "recall", 4))', "which_score"),
    ("fid.py", "Inception Score of the real images", "if fake.logits is not None:\n        scores[\"is\"], scores[\"is_std\"] = inception_score(fake.logits.to(device))", "if fake.logits is not None:\n        scores[\"is\"], scores[\"is_std\"] = inception_score(real.logits.to(device))", "which_score"),
    ("extras/metrics.py", "KID is biased", "(size * (size - 1))", "(size * size)", "kernel_distance"),
    ("extras/metrics.py", "each point is its own neighbour", "kthvalue(k + 1)", "kthvalue(k)", "kernel_distance"),
    ("extras/sampling_options.py", "classes not as often as in the data", "ends = np.cumsum([counts[label] for label in chosen])", "ends = np.cumsum([1 for label in chosen])", "class"),
    ("extras/fid_sources.py", "every share draws the first images", "seed=self.seed, first=i,", "seed=self.seed, first=0,", "samples_of_a_checkpoint"),
    ("extras/tokenizer_metrics.py", "perplexity of the first power", "float(torch.special.entr(p).sum().exp())", "float(torch.special.entr(p).sum())", "usage_and"),
    ("extras/vqgan_losses.py", "hinge of one side", "0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())", "0.5 * (F.relu(1 - real).mean() + F.relu(1 - fake).mean())", "test_discriminator"),
    ("extras/vqgan_losses.py", "adaptive weight upside down", "return (a / (b + 1e-6))", "return (b / (a + 1e-6))", "test_discriminator"),
    ("extras/vqgan_losses.py", "LPIPS is not normalised", "yield F.normalize(h, dim=1, eps=1e-10)", "yield h", "test_lpips"),
    ("extras/pictures.py", "the mask upside down", ".any(3).any(1).flatten()", ".any(3).any(1).flip(0).flatten()", "special_pictures"),
    ("extras/run_page.py", "the oldest picture is shown", 'tag("a", tag("img", src=files[-1],', 'tag("a", tag("img", src=files[0],', "page_of_a_run"),
    ("extras/run_facts.py", "the first value for the last", "return float(curve[-1][1]) if len(curve) else None", "return float(curve[0][1]) if len(curve) else None", "page_of_a_run"),
    ("extras/svg_curves.py", "attributes are not escaped", '="{escape(printable(str(value)))}"', '="{printable(str(value))}"', "names_are_escaped"),
    # -- engine/
    ("engine/randomness.py", "seed + index", "return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))", "return sum(key)", "test_seeds"),
    ("engine/randomness.py", "one order for all epochs", "1 << 40, epoch))).permutation(n)", "1 << 40, 0))).permutation(n)", "batches_walk"),
    ("engine/randomness.py", "two stages share their numbers", '"evaluation": 2,', '"evaluation": 1,', "test_seeds"),
    ("engine/batches.py", "processes train on the same images", "mine = slice(rank * B // world, (rank + 1) * B // world)", "mine = slice(0, B // world)", "shares_of_two"),
    ("engine/batches.py", "all images are mirrored", "[mine] < 0.5\n", "[mine] < 1.5\n", "steps_of_the_tokenizers"),
    ("engine/distributed.py", "the mean over processes instead of the sum", "(loss * world if world > 1 else loss).backward()", "loss.backward()", "shares_of_two"),
    ("engine/distributed.py", "clipping missing in stage 1", "norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)", "norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9)", "a_step_of_the_tokenizer"),
    ("engine/distributed.py", "gradients of one process only", "with loss_of.no_sync() if alone", "with loss_of.no_sync() if world > 1 and not fsdp", "shares_of_two or two_processes_train"),
    ("engine/distributed.py", "passes overlap", "rank + i * world, passes * world))", "rank, passes * world))", "shares"),
    ("engine/distributed.py", "n_rec of a share is that of all", "len(range(part, n_rec, parts)), counts", "n_rec, counts", "shares"),
    ("engine/run.py", "a process that fails waits for the others", "at_once = status and uses_nccl()", "at_once = False", "one_process_that"),
    ("engine/run.py", "memory of another process than the first", "alone = rank == 0 or isinstance(error, OutOfMemory)", "alone = rank == 0", "one_process_that"),
    ("engine/arrays.py", "a disk that fills up under a memory map", "reserve(fresh)", "pass", "resumable_array"),
    ("engine/checkpoint.py", "processes go on from different steps", "if all_reduce_max(step) != -all_reduce_max(-step):", "if False:", "different_checkpoints"),
    ("vqvae.py", "restarted codes differ in the last bits", "self.running_count.copy_(count)\n        copy_from_first(self.state_dict().values())", "self.running_count.copy_(count)", "one_codebook_in"),
    ("vqvae.py", "the first codes differ in the last bits", "        copy_from_first(self.state_dict().values())  # sums", "        # sums", "one_codebook_in"),
    ("extras/price.py", "tokens on the device are not counted", 'stages["diffusion"].total += beside', "pass", "price"),
    ("engine/status.py", "a row of evaluation.csv twice after a kill", "        trim_rows(path, step - 1)", "        trim_rows(path, step)", "evaluated_twice"),
    ("extras/fid_sources.py", "a row of fid.csv twice after a kill", 'trim_rows(run.out / "fid.csv", step - 1)', 'trim_rows(run.out / "fid.csv", step)', "train_evaluates_fid"),
    ("extras/sampling_options.py", "guided by a class that was never trained", 'if not names or not pipeline.config["training"]["label_drop"]:', "if not names:", "never_trained"),
    ("engine/config.py", "pictures guided by a class that was never trained", 'config["guidance"] = 0.0', "pass", "never_trained"),
    ("extras/data_forms.py", "a class called train takes all", " and (split is not None or nested):", ":", "test_folder"),
    ("extras/datasets.py", "another set below --root", "if root is not None and not any(", "if root is not None or not any(", "names_are_looked"),
    ("extras/grids.py", "pairs in a last row that is not full", "above[:-len(above) % columns]", "above[:0]", "pairs_of"),
    ("engine/config.py", "a clip of 0 is accepted", '"clip": (1e-6, math.inf), ', "", "bad_input"),
    ("engine/status.py", "a row is the last step", "means = [sum(column) / len(self.checked)", "means = [column[-1]", "steps_of_the_tokenizers or three_steps"),
    ("engine/status.py", "codes in use are never forgotten", "self.used.zero_()", "pass", "status_lines"),
    ("engine/status.py", "what is not finite is saved", "if not row.isfinite().all():", "if False:", "not_finite"),
    ("engine/status.py", "half a row is kept", "if len(row) == len(rows[0]) and int(row[0]) <= last_step]", "if int(row[0]) <= last_step]", "half_a_line"),
    ("engine/checkpoint.py", "the file before is not kept", "keep_as=previous(path))", "keep_as=None)", "checkpoint_before or not_finite"),
    ("engine/run.py", "written in place", "partial.replace(path)\n\n\ndef write_json", "path.write_bytes(partial.read_bytes())\n\n\ndef write_json", "atomic_writes"),
    ("engine/run.py", "one Ctrl-C is not enough", "if number == signal.SIGINT in SIGNALS:", "if number in SIGNALS:", "stopping_twice"),
    ("engine/config.py", "a preset wins over the command line", "config = for_gpus(DEFAULTS | PRESETS[preset] | fixed, S) | given", "config = for_gpus(DEFAULTS | given | PRESETS[preset] | fixed, S)", "every_flag_of_train or presets"),
    ("engine/config.py", "the schedule starts far above the clip", '"log_snr_max": (float, 3.0,', '"log_snr_max": (float, 7.0,', "losses_alone"),
    ("extras/two_tokens.py", "the last column is the first schedule's", "two_tokens(distances, ours, args.weight_clip)", "two_tokens(distances, long, args.weight_clip)", "losses_alone"),
    ("engine/config.py", "lr may not change", '"fsdp", "lr", "tokenizer_lr",', '"fsdp", "tokenizer_lr",', "what_may_change or not_finite"),
    ("engine/tokens.py", "training images are held out", "return TokenDataset(rows[~rows[\"test\"]], device),", "return TokenDataset(rows[rows[\"test\"]], device),", "three_steps"),
    ("engine/tokens.py", "mirrored images are not mirrored", "for oriented in (images, images.flip(3))[:len(starts)]]", "for oriented in (images, images)[:len(starts)]]", "test_flip"),
    ("engine/tokens.py", "tokens from 32768 on are negative", "self.x[indices].long() & 0xFFFF,", "self.x[indices].long(),", "sixteen_bits"),
    ("engine/tokens.py", "tokens of another tokenizer are taken", 'if maker and maker[0] != f"tokenizer {asked}":', "if False:", "tokens_of_another"),
    ("engine/read_back.py", "names are printed as they are", "else \"\".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)", "else text", "names_of_others or bad_files"),
    ("engine/read_back.py", "weights that are not finite", "if value.is_floating_point() and not value.isfinite().all():", "if False:", "that_lie"),
    ("engine/read_back.py", "shapes are not compared", "if value.shape != model.shape or value.dtype", "if value.dtype", "that_lie"),
    ("engine/read_back.py", "what unpacks has no limit", "if unpacked > 8 * packed:", "if False:", "that_lie or that_lies or small_files"),
    ("engine/checkpoint.py", "class counts may be a tensor", 'if len(expect(f"{path}: class_counts", counts, list)) >', "if len(counts) >", "checkpoints_that_lie"),
    ("engine/checkpoint.py", "class counts may be negative, and of any type", '[expect(f"{path}: class_counts", count, int, 0, 1 << 40) for count in counts]', "[count for count in counts]", "checkpoints_that_lie"),
    ("engine/best.py", "bits of fewer images are compared", "bits.ndim != 1 or len(bits) < images", "bits.ndim != 1", "best_checkpoints_that_lie"),
    ("engine/best.py", "bits that are claimed are filled", "    check_tensor(where, bits)\n", "", "best_checkpoints_that_lie"),
    ("extras/archives.py", "arrays are copied before their pixels are counted", "check_pixels(source.shape[1], source.shape[0], most)  # it", "pass  # it", "saved_images_that_lie"),
    ("extras/archives.py", "features may be too large for float32", "    if not np.isfinite(features).all():\n", "    if False:\n", "statistics_that_lie"),
    ("extras/archives.py", "features of more images than there were", "or not 2 <= len(features) <= most:", "or False:", "statistics_that_lie"),
    ("extras/archives.py", "a covariance may be anything", "if rank == 2 and not (", "if rank == 3 and not (", "statistics_that_lie"),
    ("extras/fid_sources.py", "any statistics in the cache are believed", "if found.n == n and", "if True or found.n == n and", "caches_of_statistics"),
    ("extras/fid_sources.py", "a damaged cache of statistics is an error", "    except UserError as error:\n        return print(", "    except ZeroDivisionError as error:\n        return print(", "caches_of_statistics"),
    ("extras/image_cache.py", "rows are looked at before they are counted", '        at_most(path, len(rows), "VQLCMD_MAX_IMAGES")', '        pass', "saved_images_that_lie"),
    ("extras/image_cache.py", "labels in a run's cache are believed", " | (rows[\"label\"] != source.labels[items]))", ")", "caches_of_images"),
    ("extras/image_cache.py", "lying rows of a cache are not decoded anew", "    rows[\"split\"][wrong_rows(source, rows)] = NO_IMAGE", "    wrong_rows(source, rows)", "caches_of_images"),
    ("extras/foreign_checkpoint.py", "any name in a pickle", "if plain or module.split(\".\")[0] in STUBBED:", "if True:", "hostile_checkpoints"),
    # -- experiments/baselines.py
    ("experiments/baselines.py", "b and c swapped", "return 1 - t, b * t, c * t", "return 1 - t, c * t, b * t", "by_enumeration"),
    ("experiments/baselines.py", "corrupted too seldom", "torch.where(u < a, x, torch.where(u < a + b, other, K))", "torch.where(u < a + b, x, torch.where(u < a, other, K))", "by_enumeration"),
    ("experiments/baselines.py", "the network does not see the tokens", "z = F.embedding(x_t.clamp(max=model.K - 1), table)", "z = F.embedding(0 * x_t, table)", "by_enumeration"),
    ("experiments/baselines.py", "the mask is not told", "null if labels is None else labels, mask=mask, table=table)", "null if labels is None else labels, table=table)", "by_enumeration"),
    ("experiments/baselines.py", "labels are not told", "null if labels is None else labels, mask=mask,", "null, mask=mask,", "by_enumeration"),
    ("experiments/baselines.py", "guidance off by one", "logits = (1 + guidance) * logits - guidance * model", "logits = guidance * logits - (guidance - 1) * model", "by_enumeration"),
    ("experiments/baselines.py", "guidance without the mask", "model(z, log_snr, null, mask=mask, table=table)\n", "model(z, log_snr, null, table=table)\n", "by_enumeration"),
    ("experiments/baselines.py", "a mask may turn back", "as_mask = masked * c_s * total", "as_mask = c_s * total", "by_enumeration"),
    ("experiments/baselines.py", "prediction is not mixed over codes", "as_code = arrive * (a_s * weight + b_s / K * total)", "as_code = arrive * (a_s * weight + b_s / K)", "by_enumeration"),
    ("experiments/baselines.py", "T times too small", "return T * kl.mean(1)", "return kl.mean(1)", "by_enumeration"),
    ("experiments/baselines.py", "auxiliary term with the wrong sign", "kl = kl - auxiliary * log_p", "kl = kl + auxiliary * log_p", "by_enumeration"),
    ("experiments/baselines.py", "samples without labels", "p = predict(model, schedule, x, t, labels, omega, kind if analytic else None, temperature)", "p = predict(model, schedule, x, t, None, omega, kind if analytic else None, temperature)", "by_enumeration"),
    ("experiments/baselines.py", "least confident kept", "confidence.argsort(dim=1, descending=True)", "confidence.argsort(dim=1)", "most_confident"),
    ("experiments/baselines.py", "decoded tokens not kept", "torch.where(kept & masks, drawn, x)", "torch.where(kept, drawn, x)", "most_confident"),
    ("experiments/baselines.py", "temperature ignored", "return (logits / temperature).log_softmax(-1)", "return logits.log_softmax(-1)", "by_enumeration"),
    ("experiments/baselines.py", "a linear number of masks", "math.cos((steps - i + 1) / steps * math.pi / 2)", "(1 - (steps - i + 1) / steps)", "most_confident"),
    ("experiments/baselines.py", "calls for nothing", "left - 1), 0)", "left), 0)", "most_confident"),
    ("experiments/baselines.py", "time of the step, not of what is masked", "masks.float().mean(1), labels", "torch.full((n,), i / steps, device=device), labels", "most_confident"),
    ("experiments/excess.py", "messages from the right are left out", "now + backward[-1])[:, None, :], 2))", "now)[:, None, :], 2))", "test_excess"),
    ("experiments/excess.py", "masks count alike at all times", "* masked).mean(1) / t", "* masked).mean(1)", "test_excess"),
    ("experiments/compare.py", "weights of other settings are taken", "if value != settings[name]:", "if False:", "test_compare"),
    ("experiments/compare.py", "a row that was stopped forgets its optimizer", '{"model": model, "ema": ema, "optimizer": optimizer}, path', '{"model": model, "ema": ema}, path', "test_compare"),
    ("experiments/tuned.py", "a longer training is tuned again", "args.seeds[0], args.tuned_at, calls", "args.seeds[0], args.budget, calls", "test_tuned"),
    ("experiments/tuned.py", "a guided step counts once", "if steps + guided <= calls:", "if steps <= calls:", "guided_steps"),
    ("experiments/tuned.py", "calls of another grid", "time_grid(steps, end) if", "time_grid(steps) if", "guided_steps"),
    ("experiments/baselines.py", "tokens drawn at 1 / steps, whatever the end", "torch.linspace(1.0, end, steps", "torch.linspace(1.0, 1 / steps, steps", "enumeration"),
    ("experiments/tuned.py", "guided at t below the bound alone", "t <= guided_below for", "t < guided_below for", "guided_steps"),
    ("experiments/tuned.py", "guidance at the end of the grid", 'if best["guidance"] == max(omegas, default=1) and', "if False and", "larger_one_is_tried"),
    ("experiments/tuned.py", "more guidance than allowed", "and 2 * omegas[-1] <= args.most_guidance:", "and True:", "larger_one_is_tried"),
    ("experiments/tuned.py", "an end at the edge of what is tried is taken", 'elif best["end"] == ends[-1] < ENDS[-1]:', "elif False:", "larger_one_is_tried"),
    ("experiments/tuned.py", "the first of the larger ends is taken", 'best["end"] == ends[-1] < ENDS[-1]', 'best["end"] == ends[0] < ENDS[-1]', "larger_one_is_tried"),
    ("experiments/tables.py", "a tried setting counts as a result", '(line["row"], line["purpose"]) == (row, purpose)', '(line["row"], line["purpose"][:1]) == (row, purpose[:1])', "tables_of_the_experiments"),
    ("experiments/tuned.py", "VQ-LCMD's own end is said", "or not math.isclose", "or math.isclose", "words_of_a_setting"),
    ("experiments/tuned.py", "the own end is that without guidance", "else default_end(steps, guidance)", "else default_end(steps)", "words_of_a_setting"),
    ("experiments/baselines.py", "strong guidance leaves nothing", "p = p.clamp(min=1e-30)", "p = p.clamp(min=0.0)", "strong_guidance"),
    ("experiments/baselines.py", "discrete samples guided always", "omega = guidance if now <= guided_below else 0.0\n        p =", "omega = guidance\n        p =", "guided_steps"),
    ("experiments/baselines.py", "decoding by confidence guided always", "omega = guidance if i / steps <= guided_below else 0.0\n        log_p", "omega = guidance\n        log_p", "most_confident"),
    ("experiments/compare.py", "held out: the first rows of a set that is sorted", "held_out[spread_out(len(held_out), HELD_OUT)]", "held_out[:HELD_OUT]", "test_compare"),
    ("experiments/baselines.py", "noise of the confidence does not fall", "gumbel * (i - 1) / steps * noise", "gumbel * noise", "most_confident"),
    ("experiments/baselines.py", "label drop ignored", "labels = torch.where(drop, model.num_classes, labels)", "labels = torch.where(drop, labels, labels)", "objective_of_every"),
    ("experiments/baselines.py", "cross-entropy without t = 0", "rec = round(rec_fraction * len(x))", "rec = 0", "objective_of_every"),
    ("experiments/baselines.py", "the teacher is always the model", 'ema if options["teacher"] == "ema" else model', "model", "objective_of_every"),
]]

EQUIVALENT = {  # name: why nothing that anybody can see depends on it
}


def occurrences(fault, root=HERE):
    return (root / fault.file).read_text().count(fault.old)


def check():
    """Names of the faults whose old text is not there exactly once, and of those that are there twice."""
    names = [fault.name for fault in FAULTS]
    wrong = [f"{fault.name}: its old text occurs {occurrences(fault)} times" for fault in FAULTS
             if occurrences(fault) != 1]
    wrong += [f"{fault.name}: changes nothing" for fault in FAULTS if fault.old == fault.new]
    wrong += [f"{name}: is there twice" for name in sorted(set(names)) if names.count(name) > 1]
    return wrong + [f"{name}: explained, but no fault" for name in EQUIVALENT if name not in names]


def copy_tree(target):
    shutil.copytree(HERE, target, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs", "data", ".*_cache", "*.part"))
    return target


def run_tests(root, words, seconds):
    """The first test that fails in a tree, "" if none does; in a forked process, which imports the tree's own files."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(root)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() not in (
                HERE, HERE / "tests"))]
            os.environ["PYTHONPATH"] = str(root)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            import pytest

            class First:
                name = ""

                def pytest_runtest_logreport(self, report):
                    if report.failed and not self.name:
                        self.name = report.nodeid.split("::")[-1]

                def pytest_collectreport(self, report):
                    if report.failed and not self.name:
                        self.name = "(cannot be imported)"

            first = First()
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(root / "tmp"), *words,
                                  "test_all.py"], plugins=[first])
            none = "(no test of that name)" if status == 5 else f"(pytest ended with {int(status)})"
            os.write(write, (first.name or (none if status else "")).encode())
        finally:
            os._exit(0)
    os.close(write)
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return "(it does not end)"
        time.sleep(0.1)
    with os.fdopen(read) as pipe:
        return pipe.read()


def try_fault(fault, args):
    """A row of the table."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = copy_tree(Path(folder, "tree"))
        path = root / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new))
        killer = run_tests(root, ["-k", fault.first], args.seconds)
        if killer == "(no test of that name)":
            killer = ""
        if not killer and not args.quick:
            killer = run_tests(root, [], 10 * args.seconds)
    result = "killed" if killer else "equivalent" if fault.name in EQUIVALENT else "alive"
    return dict(zip(COLUMNS, [fault.name, result, killer, f"{time.monotonic() - began:.0f}"], strict=True))


def read_results(path):
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["fault"]: row for row in csv.DictReader(file)}


def write_results(path, results):
    with path.with_suffix(".part").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(results.values())
    path.with_suffix(".part").replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--check", action="store_true", help="only look whether every old text is there exactly once")
    parser.add_argument("--only", help="faults whose file or description has one of these words, by commas")
    parser.add_argument("--quick", action="store_true", help="only the tests that should kill a fault, not the rest")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried side by side (default: 1)")
    parser.add_argument("--seconds", type=float, default=600, help="after which a fault counts as killed (default: 600)")
    parser.add_argument("--out", type=Path, default=Path("faults.csv"), help="the table; killed ones are not tried again")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if not args.only or any(word in fault.name for word in args.only.split(","))]
    if args.list:
        return print("\n".join(f"{fault.name}\n    - {fault.old!r}\n    + {fault.new!r}" for fault in chosen))
    if wrong := check():
        sys.exit("\n".join(["faults.py: error: mend the list:", *wrong]))
    if args.check:
        return print(f"{len(FAULTS)} faults, every old text is there exactly once")
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER": "gw0"}  # one thread, as a worker of pytest -n
    import PIL.Image  # noqa: F401  what the forked processes need not import again
    import pytest  # noqa: F401
    import scipy.special  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import torch.testing  # noqa: F401
    import tqdm  # noqa: F401
    results = read_results(args.out)
    todo = [fault for fault in chosen if results.get(fault.name, {}).get("result") != "killed"]
    if todo:
        with tempfile.TemporaryDirectory() as folder:
            words = " or ".join(sorted({word for fault in todo for word in fault.first.split(" or ")}))
            if broken := run_tests(copy_tree(Path(folder, "tree")), ["-k", words], 10 * args.seconds):
                sys.exit(f"faults.py: error: without any fault {broken} fails: mend it first")
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda fault: try_fault(fault, args), todo):
            results[row["fault"]] = row
            write_results(args.out, results)
            print(f"{row['result']:10} {row['fault']:75} {row['killed by']}  ({row['seconds']} s)", flush=True)
    rows = [results[fault.name] for fault in chosen if fault.name in results]
    counts = {result: sum(row["result"] == result for row in rows) for result in ("killed", "equivalent", "alive")}
    print(f"{len(rows)} of {len(chosen)} faults tried: " + ", ".join(f"{n} {result}" for result, n in counts.items()))
    print("\n".join(f"alive: {row['fault']}" for row in rows if row["result"] == "alive"))


if __name__ == "__main__":
    main()
