//! Topic patterns of an AMQP topic exchange: pure.

/// True when a topic exchange routes `topic` by `pattern`: `*` stands for one word, `#` for any number of words.
/// The same as the SQL function `oncebox.topic_matches`.
pub fn matches(pattern: &str, topic: &str) -> bool {
    // The broker sees no word in an empty text, and one empty word before, between and behind dots.
    let words = |text: &str| -> Vec<String> {
        if text.is_empty() { Vec::new() } else { text.split('.').map(str::to_owned).collect() }
    };
    let (pattern, topic) = (words(pattern), words(topic));
    let (mut p, mut t) = (0, 0);
    // Behind the last # that was passed, and where in the topic what follows it was tried.
    let mut hash: Option<(usize, usize)> = None;
    while t < topic.len() {
        match pattern.get(p).map(String::as_str) {
            Some("#") => {
                p += 1;
                hash = Some((p, t));
            }
            Some(word) if word == "*" || word == topic[t] => {
                p += 1;
                t += 1;
            }
            _ => match hash.as_mut() {
                Some((behind, tried)) => {
                    *tried += 1;
                    (p, t) = (*behind, *tried);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|word| word == "#")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, word by word.
    fn by_definition(pattern: &[&str], topic: &[&str]) -> bool {
        match (pattern, topic) {
            ([], topic) => topic.is_empty(),
            (["#", rest @ ..], topic) => (0..=topic.len()).any(|skip| by_definition(rest, &topic[skip..])),
            (["*", rest @ ..], [_, left @ ..]) => by_definition(rest, left),
            ([word, rest @ ..], [first, left @ ..]) => word == first && by_definition(rest, left),
            _ => false,
        }
    }

    proptest! {
        /// Goal: going back to the last # alone finds every match.
        #[test]
        fn matches_are_those_of_the_definition(
            pattern in prop::collection::vec(prop::sample::select(vec!["a", "b", "*", "#", ""]), 1..7),
            topic in prop::collection::vec(prop::sample::select(vec!["a", "b", "*", "#", ""]), 1..7),
        ) {
            let (joined, joined_topic) = (pattern.join("."), topic.join("."));
            prop_assume!(!joined.is_empty() && !joined_topic.is_empty());
            prop_assert_eq!(matches(&joined, &joined_topic), by_definition(&pattern, &topic));
        }
    }

    /// Goal: routing is RabbitMQ's, or tests on the broker in memory prove nothing, and streams begin where they do not.
    #[test]
    fn topics_match_like_rabbitmq() {
        let matching = [("a.*", "a.b"), ("#", "a.b"), ("#", ""), ("a.#", "a"), ("a.#.z", "a.z"), ("a.#.z", "a.b.c.z")];
        let not = [("a.*", "a"), ("a.*", "a.b.c"), ("a.b", "a.c"), ("*.b", "b"), ("a.#.z", "a.b")];
        assert!(matching.iter().all(|(pattern, topic)| matches(pattern, topic)));
        assert!(!not.iter().any(|(pattern, topic)| matches(pattern, topic)));
    }
}
