"""Makes the checkpoints in this folder and their goldens; README.md says what they are for.

  python generate.py PATH_OF_REFERENCE_PY      (numpy; reference.py is the one the golden kit came with)
"""
import importlib.util, json, os, re, struct, sys
import numpy as np

spec = importlib.util.spec_from_file_location("reference", sys.argv[1])
ref = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ref)
HERE = os.path.dirname(os.path.abspath(__file__))


class Model(ref.Model):
    def ffn(self, x, l, tr):
        """Spec section 7: an MTP layer is MoE whatever the main model's layer pattern says."""
        saved = self.cfg
        if l >= self.L:
            self.cfg = {**saved, "moe_layer_freq": 1, "first_k_dense_replace": 0}
        y = super().ffn(x, l, tr)
        self.cfg = saved
        return y


def write_safetensors(path, tensors):
    """tensors: name -> (dtype name, array)"""
    head, at = {}, 0
    for name, (dt, a) in tensors.items():
        head[name] = {"dtype": dt, "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    raw = json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for _, a in tensors.values():
            f.write(np.ascontiguousarray(a).tobytes())


def quantise(w, block):
    """-> e4m3 codes, scale_inv"""
    m, n = w.shape
    s = np.zeros((-(-m // block[0]), -(-n // block[1])), np.float32)
    q = np.zeros((m, n), np.uint8)
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            at = np.s_[i * block[0]:(i + 1) * block[0], j * block[1]:(j + 1) * block[1]]
            s[i, j] = np.float32(np.abs(w[at]).max() / 448)
            q[at] = ref.to_e4m3_codes(w[at] / s[i, j])
    return q, s


def weights(c, rng):
    """name -> float array; small layers on large embeddings, so that MTP drafts are often right"""
    D, V, H = c["hidden_size"], c["vocab_size"], c["num_attention_heads"]
    dn, dr, dv, r = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    L, K, E = c["num_hidden_layers"], c.get("num_nextn_predict_layers", 0), c["n_routed_experts"]
    w = {}

    def lin(name, out, inp, gain=1.0, bias=False):
        w[name + ".weight"] = rng.normal(size=(out, inp)) * gain / np.sqrt(inp)
        if bias:
            w[name + ".bias"] = rng.normal(size=out) * 0.05

    def norm(name, n):
        w[name] = 1 + 0.2 * rng.normal(size=n)

    def mlp(p, inner):
        lin(p + "gate_proj", inner, D, 1.5)
        lin(p + "up_proj", inner, D)
        lin(p + "down_proj", D, inner, 0.2)

    w["model.embed_tokens.weight"] = rng.normal(size=(V, D))
    if not c["tie_word_embeddings"]:
        lin("lm_head", V, D)
    # Random signs: otherwise a tied head would predict the current token for ever.
    w["model.norm.weight"] = rng.choice([-1.0, 1.0], D) * (1 + 0.1 * rng.normal(size=D))
    for l in range(L + K):
        p = f"model.layers.{l}."
        norm(p + "input_layernorm.weight", D)
        norm(p + "post_attention_layernorm.weight", D)
        a, b = p + "self_attn.", c["attention_bias"]
        if c["q_lora_rank"]:
            lin(a + "q_a_proj", c["q_lora_rank"], D, 1, b)
            norm(a + "q_a_layernorm.weight", c["q_lora_rank"])
            lin(a + "q_b_proj", H * (dn + dr), c["q_lora_rank"], 1.5)
        else:
            lin(a + "q_proj", H * (dn + dr), D, 1.5)
        lin(a + "kv_a_proj_with_mqa", r + dr, D, 1, b)
        norm(a + "kv_a_layernorm.weight", r)
        lin(a + "kv_b_proj", H * (dn + dv), r)
        lin(a + "o_proj", D, H * dv, 0.15, b)
        if l >= L or (l >= c["first_k_dense_replace"] and l % c["moe_layer_freq"] == 0):
            lin(p + "mlp.gate", E, D)
            if c["scoring_func"] == "sigmoid":
                w[p + "mlp.gate.e_score_correction_bias"] = rng.normal(size=E) * 0.1
            for e in range(E):
                mlp(f"{p}mlp.experts.{e}.", c["moe_intermediate_size"])
            if c.get("n_shared_experts"):
                mlp(p + "mlp.shared_experts.", c["n_shared_experts"] * c["moe_intermediate_size"])
        else:
            mlp(p + "mlp.", c["intermediate_size"])
        if l >= L:
            norm(p + "enorm.weight", D)
            norm(p + "hnorm.weight", D)
            w[p + "eh_proj.weight"] = np.concatenate([np.eye(D), rng.normal(size=(D, D)) * 0.1 / np.sqrt(D)], 1)
            w[p + "shared_head.norm.weight"] = w["model.norm.weight"] * (1 + 0.02 * rng.normal(size=D))
        if l == L and K:                                # the first module alone has copies, and different ones
            head = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
            w[p + "embed_tokens.weight"] = w["model.embed_tokens.weight"] + 0.03 * rng.normal(size=(V, D))
            w[p + "shared_head.head.weight"] = head + 0.03 * rng.normal(size=(V, D))
    return w


def stored(w, c, dtype):
    """name -> (dtype name, array)"""
    out = {}
    fp8 = c.get("quantization_config")
    for name, a in w.items():
        if fp8 and a.ndim == 2 and re.search(r"_proj(_with_mqa)?\.weight$", name) and "eh_proj" not in name:
            codes, scales = quantise(a, fp8["weight_block_size"])
            out[name], out[name + "_scale_inv"] = ("F8_E4M3", codes), ("F32", scales)
        elif dtype == "F16" and not name.endswith("bias"):
            out[name] = ("F16", a.astype(np.float16))
        else:
            out[name] = ("F32", a.astype(np.float32))
    return out


def make(name, cfg, written, dtype, shards, seed):
    """cfg: what reference.py understands; written: what config.json says"""
    d = os.path.join(HERE, name)
    os.makedirs(os.path.join(d, "golden"), exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = stored(weights(cfg, rng), cfg, dtype)
    if shards:
        # Every scale in another file than its weight.
        names = sorted(tensors)
        where = {n: f"model-0000{1 + n.endswith('_scale_inv')}-of-000002.safetensors" for n in names}
        for f in sorted(set(where.values())):
            write_safetensors(os.path.join(d, f), {n: tensors[n] for n in names if where[n] == f})
        json.dump({"metadata": {}, "weight_map": where}, open(os.path.join(d, "model.safetensors.index.json"), "w"), indent=1)
    else:
        write_safetensors(os.path.join(d, "model.safetensors"), tensors)
    config = os.path.join(d, "config.json")
    json.dump(cfg, open(config, "w"))
    m, naive = Model(d), Model(d, absorb=False)
    json.dump(written, open(config, "w"), indent=2)

    meta, margin = {}, np.inf
    for T in (1, 9, 40):
        prompt = [int(t) for t in rng.integers(0, cfg["vocab_size"], T)]
        tr, other = m.trace(prompt), naive.trace(prompt)
        assert all(ref.rel_l2(other[n], tr[n]) < 1e-12 for n in tr), "the two forms of attention disagree"
        greedy, gap = m.greedy(prompt, 16)
        seq = {"file": f"len{T}.safetensors", "input_ids": prompt, "greedy": greedy}
        if m.K:
            tokens, seq["mtp_accepted"] = m.speculative(prompt, 16)
            assert tokens == greedy
        margin = min(margin, gap)
        tr["input_ids"] = np.asarray(prompt)
        ids = {n for n in tr if n.split(".")[-1] in ("ids", "input_ids")}
        out = {n: ("I32", a.astype(np.int32)) if n in ids else ("F32", a.astype(np.float32)) for n, a in tr.items()}
        write_safetensors(os.path.join(d, "golden", seq["file"]), out)
        meta[f"len{T}"] = seq
        print(name, T, seq.get("mtp_accepted"), greedy)
    margins = {"router": float(m.min_margin), "top1": float(margin)}
    print(name, margins)
    assert margins["router"] > 1e-4 and margins["top1"] > 2e-3, "choose another seed"
    json.dump({"sequences": meta, "margins": margins}, open(os.path.join(d, "golden", "golden.json"), "w"), indent=1)


common = {
    "hidden_size": 48, "vocab_size": 120, "num_attention_heads": 3, "num_key_value_heads": 3, "qk_nope_head_dim": 14,
    "v_head_dim": 10, "kv_lora_rank": 36, "intermediate_size": 80, "hidden_act": "silu", "attention_bias": True,
    "bos_token_id": 0, "max_position_embeddings": 4096, "num_experts_per_tok": 3, "n_routed_experts": 8,
    "n_group": 4, "topk_group": 2,
}

v3 = {
    **common, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "qk_rope_head_dim": 12,
    "num_hidden_layers": 5, "num_nextn_predict_layers": 2, "q_lora_rank": None, "tie_word_embeddings": True,
    "moe_layer_freq": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 40, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": False, "routed_scaling_factor": 1.5, "rope_interleave": False,
    "rms_norm_eps": 1e-3, "rope_theta": 3000.0, "eos_token_id": [1, 2],
    "rope_scaling": {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 24, "beta_fast": 4,
                     "beta_slow": 1, "mscale": 0.8, "mscale_all_dim": 0.5},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 16]},
}
written = {k: v for k, v in v3.items() if k not in ("scoring_func", "rope_scaling", "rope_theta")}
written["rope_parameters"] = {**v3["rope_scaling"], "rope_theta": v3["rope_theta"]}
written["dtype"] = "bfloat16"
make("v3-odd-tiny", v3, written, "F32", True, 5)

v2 = {
    **common, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "qk_rope_head_dim": 10,
    "num_hidden_layers": 2, "q_lora_rank": 18, "tie_word_embeddings": False, "moe_layer_freq": 1,
    "first_k_dense_replace": 0, "moe_intermediate_size": 20, "topk_method": "group_limited_greedy",
    "scoring_func": "softmax", "norm_topk_prob": True, "routed_scaling_factor": 4.0, "rms_norm_eps": 1e-2,
    "rope_theta": 500.0, "n_shared_experts": 2, "eos_token_id": 1, "rope_scaling": None,
}
written = {k: v for k, v in v2.items() if k not in ("scoring_func", "rope_scaling", "rope_theta", "moe_layer_freq")}
written["rope_parameters"] = {"rope_type": "default", "rope_theta": v2["rope_theta"]}
make("v2-odd-tiny", v2, written, "F16", False, 5)
