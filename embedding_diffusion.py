"""The denoiser: learned token embeddings and a transformer that reads noisy ones and names the clean tokens.

    noisy embeddings z_t (B, N, D), log-SNR, class  ->  logits (B, N, K), one p_theta(x_i | z_t) per token
    predicted embedding  e_hat = sum_k p_theta(k | z_t) E_k, which lies in the convex hull of the table E

From the paper: tokens x live in a learned K x D table E, trained together with the denoiser; the denoiser
ends in a softmax over the K tokens; some embeddings are dropped at random in training. From Plaid (Gulrajani
& Hashimoto 2023, Likelihood-Based Diffusion Language Models): e_hat as the softmax's mixture of the table,
which they call categorical reparameterisation, rows of one length, and the output prior below. From DiT
(Peebles & Xie 2023): adaptive layer norm. Ours: the table's start at the tokenizer's codebook.

The output prior (Plaid). Given the tokens, the noise is independent from position to position, so Bayes' rule
says

    p(x_i = k | z_t)  =  p(x_i = k | z_t elsewhere)  x  N(z_ti ; alpha_t E_k, sigma_t^2 I)  /  constant.

The second factor is known in closed form. We add its logarithm to the logits and the network learns the
first: what a token should be in view of its neighbours. Nothing is assumed or lost: the network also sees
z_ti and can correct. An untrained network (zero output) is then the exact denoiser of independent uniform
tokens, and its bound is log2 K bits per token (and L_prior, below 1e-3). Guidance, which combines logits,
sharpens the learned factor and leaves this one as it is. `--no-output-prior` trains without it, which is
nearer to the paper.

The same knowledge helps at the input (the posterior input, ours). What a token's own noisy embedding says, if
all are equally likely,

    E[ e(x_i) | z_ti ]  =  sum_k softmax_k( log N(z_ti ; alpha_t E_k, sigma_t^2 I) )  E_k,

is given to the network beside z_t. It would otherwise have to learn this softmax over K codes, at every noise
level, before it can ask what the neighbours are. `--no-posterior-input` trains without it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from schedule import alpha_sigma


def normalise(table, norm):
    """Normalises each row of the (K, D) table, as Plaid and CDCD do: growing the signal wins nothing.

    "rms": mean square 1 over D (theirs: length 1), needs D >= 2.  "layer": also mean 0, needs D >= 3, rank at
    most D - 1.  "none": as it is, an ablation.  No affine parameters. Neither keeps two rows from merging.
    """
    if norm == "rms":
        return F.rms_norm(table, table.shape[-1:], eps=1e-8)
    if norm == "layer":
        return F.layer_norm(table, table.shape[-1:], eps=1e-8)
    return table


def modulate(h, shift, scale):
    """Adaptive layer norm: h (B, N, width), shift and scale (B, width)."""
    return torch.addcmul(shift[:, None], h, 1 + scale[:, None])


class Block(nn.Module):
    """Pre-norm transformer block. The condition c sets shift, scale and gate of each branch (adaLN-zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        # QK normalisation: attention logits stay bounded, so bf16 and large learning rates stay stable. Only
        # the weights are used, below: their product does the work of both in one pass.
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h, c):
        B, N, width = h.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)  # each (B, width)
        qkv = self.qkv(modulate(self.norm1(h), shift1, scale1))                            # (B, N, 3 width)
        qkv = qkv.view(B, N, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                               # (B, heads, N, .)
        q, k = (F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in (q, k))
        q = q * (self.q_norm.weight * self.k_norm.weight)  # of the two weights, only the product counts
        attention = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)          # (B, heads, N, .)
        attention = self.proj(attention.transpose(1, 2).reshape(B, N, width))              # (B, N, width)
        h = torch.addcmul(h, gate1[:, None], attention)  # h + gate * attention, read and written once
        mlp = self.mlp(modulate(self.norm2(h), shift2, scale2))                            # (B, N, width)
        return torch.addcmul(h, gate2[:, None], mlp)


def sincos_2d(grid_h, grid_w, width):
    """(N, width) sines and cosines of row and column: the start of the learned position embedding."""
    frequency = 1 / 100 ** (torch.arange(width // 4) / (width // 4))                       # (width/4,)
    rows, columns = torch.meshgrid(torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
    positions = torch.stack([rows, columns], -1).reshape(-1, 2, 1)                         # (N, 2, 1)
    angles = (positions * frequency).flatten(1)                                            # (N, width/2)
    return torch.cat([angles.sin(), angles.cos()], 1)


class EmbeddingDiffusion(nn.Module):
    """Learned embedding table and denoiser p_theta(x | z_t).

    K: codebook size. grid: (rows, columns) of tokens, N = rows * columns. D: embedding width. num_classes: 0
    for unconditional; class number num_classes is the null class of classifier-free guidance. output_prior:
    add Plaid's closed-form term. posterior_input: show E[e(x_i) | z_ti] at the input, too. bf16: matrix
    products of the transformer in bfloat16; table, output prior, softmax and e_hat stay in float32.
    recompute: keep only what enters a block for the backward pass, and run the block again there (activation
    checkpointing): a fraction of the memory, 1.1 to 1.2 times a step, same numbers.
    """

    def __init__(self, K, grid, D, width, depth, heads, num_classes=0, norm="rms", output_prior=True,
                 posterior_input=True, bf16=False, recompute=False):
        super().__init__()
        if norm not in ("rms", "layer", "none"):
            raise ValueError(f"norm must be rms, layer or none, got {norm!r}")
        if D < {"rms": 2, "layer": 3, "none": 1}[norm]:
            raise ValueError(f"D = {D} is too small for norm {norm!r}: rms needs 2, layer needs 3")
        if width % heads or width % 4:
            raise ValueError(f"width = {width} must be a multiple of heads = {heads} and of 4")
        self.K, self.N, self.D, self.num_classes = K, grid[0] * grid[1], D, num_classes
        self.norm, self.output_prior, self.posterior_input = norm, output_prior, posterior_input
        self.bf16, self.recompute = bf16, recompute
        self.embedding = nn.Parameter(torch.randn(K, D))  # standard deviation 1, as after normalise
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(sincos_2d(*grid, width))
        self.input = nn.Linear(2 * D if posterior_input else D, width)
        self.log_snr_mlp = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, K)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        # Zero gates make every block the identity at first; a zero head starts at uniform predictions.
        for layer in [block.modulation for block in self.blocks] + [self.final_modulation, self.head]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def table(self):
        """The normalised table (K, D): the one that is noised, predicted and sampled with. float32."""
        return normalise(self.embedding, self.norm)

    @torch.no_grad()
    def init_from_codebook(self, codes):
        """Starts the table at the tokenizer's codes (K, C) (ours): tokens that look alike are close.

        With the singular value decomposition U S V of the centred codes, U S is the codebook up to a
        rotation: nearly flat, for a few directions have all the spread. U alone is whitened: noise is as loud
        as colour. We take the first D columns of U S^1/2. The table is trained from there as usual.
        """
        centred = (codes - codes.mean(0)).cpu().double()
        U, S, _ = torch.linalg.svd(centred, full_matrices=False)                           # (K, r), (r,)
        components = (U * S.sqrt())[:, :self.D]                                            # (K, min(r, D))
        self.embedding.copy_(F.pad(components / components.std(), (0, self.D - components.shape[1])))

    def condition(self, log_snr, labels):
        """log_snr (B,), labels (B,) int64 -> (B, width). Sinusoids of lambda with periods from 1.5 to 600."""
        frequency = torch.exp(torch.linspace(math.log(0.01), math.log(4.0), 64, device=log_snr.device))
        angles = log_snr[:, None] * frequency                                              # (B, 64)
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.input.weight.dtype)  # (B, 128)
        return F.silu(self.log_snr_mlp(features) + self.class_embedding(labels))           # (B, width)

    def log_likelihood(self, z, log_snr, table):
        """log N(z_i ; alpha E_k, sigma^2 I) for each k, up to a constant in k -> (B, N, K).

            (alpha z.E_k - alpha^2 |E_k|^2 / 2) / sigma^2,   alpha^2 / sigma^2 = e^lambda

        z: (B, N, D), log_snr: (B,), table: (K, D). Both terms in one matrix product, of D + 1 factors.
        """
        alpha, sigma = alpha_sigma(log_snr)
        snr = log_snr.exp()[:, None, None].expand(-1, self.N, 1)                           # (B, N, 1)
        evidence = torch.cat([z * (alpha / sigma.square())[:, None, None], snr], dim=-1)   # (B, N, D + 1)
        return evidence @ torch.cat([table, -table.square().sum(1, keepdim=True) / 2], dim=1).T

    def forward(self, z, log_snr, labels, mask=None, table=None):
        """z (B, N, D), log_snr (B,), labels (B,) -> logits (B, N, K) in float32.

        labels: num_classes is the null class (0, where there are no classes). mask (B, N) bool: positions
        whose embedding is dropped; the network is told, by a learned mask embedding in place of the input.
        Nothing of their z reaches the output: they are named from their neighbours. table: self.table().
        """
        B, N, D = z.shape
        assert (N, D) == (self.N, self.D), f"expected (B, {self.N}, {self.D}), got {tuple(z.shape)}"
        table = self.table() if table is None else table
        inputs = z
        with torch.autocast(z.device.type, enabled=False):
            if self.output_prior or self.posterior_input:
                own = self.log_likelihood(z, log_snr, table)                               # (B, N, K)
            if self.posterior_input:
                inputs = torch.cat([z, own.softmax(-1) @ table], dim=-1)                   # (B, N, 2 D)
        with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            h = self.input(inputs)                                                         # (B, N, width)
            if mask is not None:
                h = torch.where(mask[..., None], self.mask_embedding.to(h.dtype), h)
            h = h + self.position
            c = self.condition(log_snr, labels)                                            # (B, width)
            for block in self.blocks:
                if self.recompute and torch.is_grad_enabled():  # nothing in a block is random
                    h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)
                else:
                    h = block(h, c)                                                        # (B, N, width)
            h = modulate(self.final_norm(h), *self.final_modulation(c).chunk(2, dim=-1))   # (B, N, width)
            logits = self.head(h)                                                          # (B, N, K)
        with torch.autocast(z.device.type, enabled=False):
            logits = logits.to(table.dtype)
            if self.output_prior:  # in place: a pass over (B, N, K) costs about as much as a layer
                if mask is None:
                    logits = logits.add_(own)
                else:
                    logits = logits.addcmul_(own, (~mask[..., None]).to(own.dtype))
        return logits

    def guided(self, z, log_snr, labels, guidance, table=None):
        """Classifier-free guidance on raw logits: (1 + omega) conditional - omega unconditional.

        Raw logits, never log-softmax, whose underflow would give inf - inf. omega = 0 skips the second pass.
        """
        if guidance == 0 or self.num_classes == 0:
            return self(z, log_snr, labels, table=table)
        null = torch.full_like(labels, self.num_classes)
        conditional, unconditional = self(torch.cat([z, z]), torch.cat([log_snr, log_snr]),
                                          torch.cat([labels, null]), table=table).chunk(2)
        return (1 + guidance) * conditional - guidance * unconditional                     # (B, N, K)
