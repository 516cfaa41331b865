//! A model that edits are tried on.

use moewe_plan::ModelInfo;

/// 5 layers, the first of which is dense; 4 experts, of which a token gets 2; 2 heads; latents of 3.
pub fn model() -> ModelInfo {
    ModelInfo {
        architecture: String::new(),
        checkpoint: String::new(),
        vocab_size: 1,
        max_context: 1,
        eos_token_ids: Vec::new(),
        layers: 5,
        moe_layers: vec![1, 2, 3, 4],
        experts: 4,
        num_experts_per_tok: 2,
        n_group: 1,
        topk_group: 1,
        n_shared_experts: 0,
        hidden_size: 1,
        num_attention_heads: 2,
        kv_lora_rank: 3,
        qk_rope_head_dim: 2,
        qk_nope_head_dim: 1,
        v_head_dim: 1,
        softmax_scale: 1.0,
        mtp_modules: 0,
    }
}
