//! Tokenizer and generation files.

use super::*;

#[test]
fn damaged_text_files() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = temp.path().join("checkpoint");
    copy(&demo(), &checkpoint);
    let run = || moewe!["run", &checkpoint, "Once", "-n", "1"];
    for (name, text, words) in [
        ("generation_config.json", "{\"temperature\": -1}", "temperature"),
        ("generation_config.json", "{\"top_p\": \"all\"}", "top_p"),
        ("generation_config.json", "[", "generation_config.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "", "tokenizer.json"),
        ("tokenizer_config.json", "{\"add_bos_token\": 7}", "add_bos_token"),
    ] {
        let path = checkpoint.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, text).unwrap();
        run().refused(1, &[path.to_str().unwrap(), words]);
        fs::write(&path, whole).unwrap();
    }
    let template = checkpoint.join("chat_template.jinja");
    for text in ["{% for %}", "{{ raise_exception('no') }}", "{% for i in range(100000000) %}{{ i }}{% endfor %}"] {
        fs::write(&template, text).unwrap();
        moewe!["chat", &checkpoint].stdin("hi\n").refused(1, &["chat_template.jinja"]);
    }
    fs::remove_file(&template).unwrap();
    fs::remove_file(checkpoint.join("tokenizer.json")).unwrap();
    run().refused(2, &["no tokenizer.json", "--tokens"]);
}
