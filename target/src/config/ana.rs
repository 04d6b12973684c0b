//! ANA states in the words of SPDK, which the file and the RPC socket use.

use flexblk_nvme::log::ana::AnaState;

const WORDS: [(AnaState, &str); 5] = [
    (AnaState::Optimized, "optimized"),
    (AnaState::NonOptimized, "non_optimized"),
    (AnaState::Inaccessible, "inaccessible"),
    (AnaState::PersistentLoss, "persistent_loss"),
    (AnaState::Change, "change"),
];

/// The word for a state.
#[must_use]
pub fn ana_state_word(state: AnaState) -> &'static str {
    let word = WORDS.iter().find(|(other, _)| *other == state);
    word.map_or("", |(_, word)| word)
}

/// The state of a word; the error lists the words.
pub fn parse_ana_state(text: &str) -> Result<AnaState, String> {
    let state = WORDS.iter().find(|(_, word)| *word == text);
    state.map(|(state, _)| *state).ok_or_else(|| {
        let words: Vec<&str> = WORDS.iter().map(|(_, word)| *word).collect();
        format!("`{text}` is no ANA state; there are {}", words.join(", "))
    })
}
