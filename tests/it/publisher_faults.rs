//! The publishing session against a broker that is slow, broken or hostile, played byte by byte: each message gets its own
//! outcome or the session ends with an error that says why, in its time. What a broker may do is in AMQP 0-9-1 and in
//! RabbitMQ's extensions (confirms, `basic.nack`, `connection.blocked`).

use crate::support::amqp_peer::{self as peer, Line, Peer, Published, Script, Step};
use crate::support::proxy::Proxy;
use crate::support::{own_rabbit, rabbit};
use oncebox::broker::rabbitmq::{RabbitMq, RabbitMqOptions, RabbitPublisher};
use oncebox::broker::{Broker, BrokerError, Outcome, Publisher, QueueSpec, Subscription};
use oncebox::message::{Envelope, Message, MessageId, Position, Void};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};
use uuid::Uuid;

const EXCHANGE: &str = "oncebox";
const SOURCE: Uuid = Uuid::from_u128(0x0b0c);
/// Longest wait for what should happen at once.
const PATIENCE: Duration = Duration::from_secs(30);
/// The session must not wait for a timeout of its own (30 s) to see what is plainly wrong.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A session in confirm mode, its broker's end, and the outcomes it has told.
struct Run {
    publisher: RabbitPublisher,
    line: Line,
    told: Vec<(u64, Outcome)>,
    peer: Peer,
}

impl Run {
    async fn open() -> Self {
        Self::with(Script::default(), |_| {}).await
    }

    async fn with(script: Script, change: impl FnOnce(&mut RabbitMqOptions)) -> Self {
        let mut peer = Peer::start(script).await;
        let broker = broker(&peer, change);
        let publisher = soon("the session", broker.publisher(EXCHANGE)).await.unwrap();
        let line = soon("its line", peer.line()).await;
        Self { publisher, line, told: Vec::new(), peer }
    }

    /// Publishes and has the peer read it all; tickets are the offsets.
    async fn deliver(&mut self, envelopes: &[Envelope]) -> Vec<Published> {
        let Self { publisher, line, told, .. } = self;
        let both = async {
            let mut reading = pin!(line.messages(envelopes.len()));
            let mut read = None;
            {
                let mut publishing = pin!(publish_all(publisher, told, envelopes));
                loop {
                    tokio::select! {
                        published = &mut publishing => break published.unwrap(),
                        messages = &mut reading, if read.is_none() => read = Some(messages),
                    }
                }
            }
            match read {
                Some(messages) => messages,
                None => polled(publisher, told, reading).await.unwrap(),
            }
        };
        soon("the messages at the peer", both).await
    }

    /// Has the peer do something while outcomes are taken.
    async fn meanwhile<'a, T, F>(&'a mut self, script: impl FnOnce(&'a mut Line) -> F) -> Result<T, BrokerError>
    where
        F: Future<Output = T> + 'a,
    {
        let Self { publisher, line, told, .. } = self;
        soon("the script", polled(publisher, told, script(line))).await
    }

    /// Has the peer say this, and takes outcomes until so many were told in all.
    async fn hear(&mut self, bytes: &[u8], told: usize) -> Result<(), BrokerError> {
        self.meanwhile(|line| line.send(bytes)).await?;
        self.until_told(told).await
    }

    async fn until_told(&mut self, n: usize) -> Result<(), BrokerError> {
        while self.told.len() < n {
            soon("an outcome", self.publisher.outcomes(&mut self.told)).await?;
        }
        Ok(())
    }

    /// The error the session ends with, or none within some time.
    async fn end_within(&mut self, limit: Duration) -> Option<BrokerError> {
        let end = async {
            loop {
                if let Err(error) = self.publisher.outcomes(&mut self.told).await {
                    return error;
                }
            }
        };
        tokio::time::timeout(limit, end).await.ok()
    }

    /// The error the session ends with; from then on it says the same to everything.
    async fn end(&mut self) -> BrokerError {
        let error = soon("the end of the session", async {
            loop {
                if let Err(error) = self.publisher.outcomes(&mut self.told).await {
                    return error;
                }
            }
        })
        .await;
        let again = soon("the end, again", self.publisher.outcomes(&mut Vec::new())).await.unwrap_err();
        let publish = soon("the end, to a publish", self.publisher.publish(0, &envelope(1))).await.unwrap_err();
        assert_eq!([&again.to_string(), &publish.to_string()], [&error.to_string(); 2]);
        error
    }

    /// What was told, by ticket.
    fn outcomes(&self) -> BTreeMap<u64, Outcome> {
        let outcomes: BTreeMap<_, _> = self.told.iter().cloned().collect();
        assert_eq!(outcomes.len(), self.told.len(), "two outcomes for one ticket: {:?}", self.told);
        outcomes
    }
}

fn broker(peer: &Peer, change: impl FnOnce(&mut RabbitMqOptions)) -> RabbitMq {
    let mut options = RabbitMqOptions::new(peer.url());
    change(&mut options);
    RabbitMq::new(options).unwrap()
}

/// Takes outcomes until the future is through.
async fn polled<T>(
    publisher: &mut RabbitPublisher,
    told: &mut Vec<(u64, Outcome)>,
    future: impl Future<Output = T>,
) -> Result<T, BrokerError> {
    let mut future = pin!(future);
    loop {
        tokio::select! {
            biased;
            done = &mut future => return Ok(done),
            batch = publisher.outcomes(told) => batch?,
        }
    }
}

/// Publishes all; takes outcomes where there is no room.
async fn publish_all(
    publisher: &mut RabbitPublisher,
    told: &mut Vec<(u64, Outcome)>,
    envelopes: &[Envelope],
) -> Result<(), BrokerError> {
    for envelope in envelopes {
        while publisher.capacity() == 0 {
            // Room may come without an outcome, by what was written.
            let tick = tokio::time::timeout(Duration::from_millis(1), publisher.outcomes(told)).await;
            tick.unwrap_or(Ok(()))?;
        }
        publisher.publish(envelope.position.offset as u64, envelope).await?;
    }
    Ok(())
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took over {PATIENCE:?}"),
    }
}

/// The `n`-th message of a test, from 1.
fn envelope(n: i64) -> Envelope {
    sized(n, 20)
}

fn sized(n: i64, bytes: usize) -> Envelope {
    let mut random = Random(n as u64);
    Envelope {
        message: Message {
            // Two share each id: no outcome may be told by it.
            id: MessageId(Uuid::from_u128(n as u128 / 2)),
            topic: format!("t.{}", n % 3),
            key: None,
            content_type: "text/plain".to_owned(),
            headers: Default::default(),
            body: (0..bytes).map(|_| random.below(256) as u8).collect(),
            published_at_s: 1_700_000_000,
        },
        position: Position { source: SOURCE, stream: format!("t.{}#0", n % 3), offset: n },
        ordinal: n,
    }
}

fn envelopes(n: i64) -> Vec<Envelope> {
    (1..=n).map(envelope).collect()
}

fn void(n: i64) -> Void {
    Void {
        position: Position { source: SOURCE, stream: "t.0#0".to_owned(), offset: n },
        topic: "t.0".to_owned(),
        message_id: MessageId(Uuid::from_u128(n as u128)),
        reason: "expired".to_owned(),
    }
}

fn no_route() -> Outcome {
    Outcome::Returned { code: 312, text: "NO_ROUTE".to_owned() }
}

/// Numbers by chance, the same at every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Goal: what a message of ours is on the wire, octet for octet, read by other code than wrote it.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_on_the_wire_as_the_contract_says() {
    let mut run = Run::with(Script::default(), |options| options.connection_name = "the session".to_owned()).await;
    let mut first = envelope(7);
    first.message.key = Some("Käthe".to_owned());
    first.message.headers = json!({"t": "é", "i": -5, "d": 1.5, "b": true, "n": null, "a": [1], "o": {"x": "y"}})
        .as_object()
        .unwrap()
        .clone();
    let seen = run.deliver(std::slice::from_ref(&first)).await.remove(0);
    assert_eq!((seen.exchange.as_str(), seen.routing_key.as_str(), seen.mandatory), (EXCHANGE, "t.1", true));
    assert_eq!(seen.body, first.message.body);
    let string = |text: &str| (b'S', text.as_bytes().to_vec());
    let long = |number: i64| (b'l', number.to_be_bytes().to_vec());
    let expected = BTreeMap::from([
        ("t", string("é")),
        ("i", long(-5)),
        ("d", (b'd', 1.5_f64.to_be_bytes().to_vec())),
        ("b", (b't', vec![1])),
        ("n", (b'V', vec![])),
        ("a", (b'A', [&[b'l'][..], &1_i64.to_be_bytes()].concat())),
        ("o", (b'F', b"\x01xS\0\0\0\x01y".to_vec())),
        ("oncebox-source", string(&SOURCE.to_string())),
        ("oncebox-stream", string("t.1#0")),
        ("oncebox-offset", long(7)),
        ("oncebox-ordinal", long(7)),
        ("oncebox-key", string("Käthe")),
    ]);
    let headers = seen.headers();
    assert_eq!(
        headers.iter().map(|(name, value)| (name.as_str(), value.clone())).collect::<BTreeMap<_, _>>(),
        expected
    );
    let table: usize = headers
        .iter()
        .map(|(name, (kind, value))| {
            let size = if matches!(kind, b'S' | b'A' | b'F') { 4 } else { 0 };
            1 + name.len() + 1 + size + value.len()
        })
        .sum();
    // content_type, headers, delivery_mode, message_id, timestamp, type, app_id.
    let mut fixed = vec![0b1011_0000, 0b1110_1000];
    fixed.extend(b"\x0atext/plain");
    fixed.extend((table as u32).to_be_bytes());
    assert!(seen.properties.starts_with(&fixed), "{:?}", seen.properties);
    let mut rest = vec![2, 36];
    rest.extend(first.message.id.to_string().bytes());
    rest.extend(1_700_000_000_u64.to_be_bytes());
    rest.extend(b"\x03t.1\x24");
    rest.extend(SOURCE.to_string().bytes());
    assert_eq!(seen.properties[fixed.len() + table..], rest);
    let notice = void(9);
    let Run { publisher, line, told, .. } = &mut run;
    soon("a notice", publisher.publish_void(9, &notice)).await.unwrap();
    let seen = soon("a notice", polled(publisher, told, line.messages(1))).await.unwrap().remove(0);
    assert_eq!((seen.exchange.as_str(), seen.mandatory, seen.body.as_slice()), ("oncebox.void", false, &b"{}"[..]));
    assert_eq!((seen.headers()["oncebox-void"].clone(), seen.offset()), (string("expired"), 9));
    // Without these RabbitMQ says neither that it blocks nor that the password is wrong.
    for capability in ["connection.blocked", "authentication_failure_close", "publisher_confirms", "basic.nack"] {
        let told = [&[capability.len() as u8], capability.as_bytes(), b"t\x01"].concat();
        assert!(run.line.start_ok.windows(told.len()).any(|part| part == told), "{capability}");
    }
    assert!(run.line.start_ok.windows(11).any(|part| part == b"the session"));
    assert_eq!(run.line.tuned, (2047, 131_072, 60));
}

/// Goal: single and multiple confirms and refusals, in any order, each to its own message.
#[tokio::test(flavor = "multi_thread")]
async fn confirms_in_any_order_are_exact() {
    let mut run = Run::open().await;
    let channel = run.line.channel;
    assert_eq!(
        run.deliver(&envelopes(12)).await.iter().map(Published::offset).collect::<Vec<_>>(),
        Vec::from_iter(1..=12)
    );
    let bytes = [
        peer::ack(channel, 5, false),
        peer::nack(channel, 3, false),
        peer::ack(channel, 2, true),
        peer::nack(channel, 6, true),
        peer::ack(channel, 12, false),
        peer::nack(channel, 8, false),
        peer::ack(channel, 7, true),
        peer::ack(channel, 11, true),
    ]
    .concat();
    run.hear(&bytes, 12).await.unwrap();
    let nacked = [3, 4, 6, 8];
    for (ticket, outcome) in run.outcomes() {
        let expected = if nacked.contains(&ticket) { Outcome::Nacked } else { Outcome::Confirmed };
        assert_eq!(outcome, expected, "{ticket}");
    }
    assert_eq!(run.publisher.unconfirmed(), 0);
    assert_eq!(run.deliver(&[envelope(13)]).await[0].tag, 13);
    run.hear(&peer::ack(channel, 13, true), 13).await.unwrap();
    run.deliver(&[envelope(14), envelope(15)]).await;
    // 0 is every message so far, by the protocol's book.
    run.hear(&peer::ack(channel, 0, true), 15).await.unwrap();
    assert_eq!(run.outcomes().remove(&15), Some(Outcome::Confirmed));
}

/// What a broker does with one flight: fates of all messages, then returns, acks and nacks by chance, as a broker may send
/// them: a message's return before its ack.
struct Fates {
    random: Random,
    fates: BTreeMap<u64, Outcome>,
    open: BTreeMap<u64, Published>,
    returned: BTreeSet<u64>,
}

impl Fates {
    fn new(seed: u64) -> Self {
        Self { random: Random(seed), fates: BTreeMap::new(), open: BTreeMap::new(), returned: BTreeSet::new() }
    }

    fn take_on(&mut self, messages: Vec<Published>) {
        for message in messages {
            let fate = match self.random.below(10) {
                0 => Outcome::Nacked,
                1 | 2 => no_route(),
                _ => Outcome::Confirmed,
            };
            self.fates.insert(message.offset() as u64, fate);
            self.open.insert(message.tag, message);
        }
    }

    fn fate(&self, tag: u64) -> Outcome {
        self.fates[&(self.open[&tag].offset() as u64)].clone()
    }

    /// The return that must come before the message's ack.
    fn give_back(&mut self, channel: u16, tag: u64, frame_bytes: usize, bytes: &mut Vec<u8>) {
        if self.fate(tag) == no_route() && self.returned.insert(tag) {
            let most = if self.random.below(2) == 0 { frame_bytes } else { 1 + self.random.below(frame_bytes) };
            bytes.extend(peer::returned(channel, &self.open[&tag], || most));
        }
    }

    /// The next thing the broker says.
    fn step(&mut self, channel: u16, frame_bytes: usize, bytes: &mut Vec<u8>) {
        let tags: Vec<u64> = self.open.keys().copied().collect();
        let tag = tags[self.random.below(tags.len())];
        match self.random.below(4) {
            0 => self.give_back(channel, tag, frame_bytes, bytes),
            1 => {
                let nacked = self.fate(tags[0]) == Outcome::Nacked;
                let alike = tags.iter().take_while(|tag| (self.fate(**tag) == Outcome::Nacked) == nacked).count();
                let upto = 1 + self.random.below(alike);
                for tag in &tags[..upto] {
                    self.give_back(channel, *tag, frame_bytes, bytes);
                }
                // A multiple may name a tag that was settled before: it means what is open up to there.
                let last = tags[upto - 1];
                bytes.extend(if nacked { peer::nack(channel, last, true) } else { peer::ack(channel, last, true) });
                self.open.retain(|tag, _| *tag > last);
            }
            _ => {
                self.give_back(channel, tag, frame_bytes, bytes);
                let nacked = self.fate(tag) == Outcome::Nacked;
                bytes.extend(if nacked { peer::nack(channel, tag, false) } else { peer::ack(channel, tag, false) });
                self.open.remove(&tag);
            }
        }
    }
}

/// Goal: whatever a broker answers in whatever order, cut and glued anywhere, each message gets its own outcome, once.
#[tokio::test(flavor = "multi_thread")]
async fn confirms_by_chance_are_exact() {
    for seed in 0..24 {
        let frame_max = if seed % 3 == 0 { 4096 } else { 131_072 };
        let mut run = Run::with(Script { frame_max, ..Script::default() }, |_| {}).await;
        let channel = run.line.channel;
        let mut fates = Fates::new(seed);
        let waves = 1 + fates.random.below(6);
        let mut published = 0;
        for wave in 1..=waves {
            let wave_of: Vec<_> = (0..1 + fates.random.below(120))
                .map(|n| {
                    let bytes = match fates.random.below(20) {
                        0 => 0,
                        1 => fates.random.below(20_000),
                        _ => fates.random.below(300),
                    };
                    sized(published + n as i64 + 1, bytes)
                })
                .collect();
            published += wave_of.len() as i64;
            let messages = run.deliver(&wave_of).await;
            fates.take_on(messages);
            let mut bytes = Vec::new();
            let keep = if wave == waves { 0 } else { fates.random.below(fates.open.len()) };
            while fates.open.len() > keep {
                fates.step(channel, frame_max as usize - peer::FRAME_OVERHEAD, &mut bytes);
            }
            let most = [1, 7, 64, 4096, usize::MAX - 1][fates.random.below(5)].min(bytes.len().max(1));
            // Single octets would take a while for all.
            let most = most.max(bytes.len() / 2_000);
            let mut cut = Random(seed);
            run.meanwhile(|line| line.send_in_pieces(&bytes, || 1 + cut.below(most))).await.unwrap();
        }
        run.until_told(published as usize).await.unwrap();
        assert_eq!(run.outcomes(), fates.fates, "seed {seed}");
        assert_eq!(run.publisher.unconfirmed(), 0);
    }
}

/// Goal: a returned message of any size keeps its fate to itself, also when one ack is for it and its neighbours.
#[tokio::test(flavor = "multi_thread")]
async fn returns_of_any_size_go_with_their_message() {
    let mut run = Run::with(Script { frame_max: 4096, ..Script::default() }, |_| {}).await;
    let channel = run.line.channel;
    let sizes = [0, 1, 4087, 4088, 4089, 100_000, 20, 0];
    let all: Vec<_> = sizes.iter().zip(1..).map(|(bytes, n)| sized(n, *bytes)).collect();
    let messages = run.deliver(&all).await;
    let mut bytes = Vec::new();
    for (index, piece) in [(0, 1), (2, 4088), (5, 4088), (5, 999), (3, 7), (7, 1)] {
        if index != 5 || piece == 999 {
            bytes.extend(peer::returned(channel, &messages[index], || piece));
        }
    }
    bytes.extend(peer::ack(channel, 2, false));
    run.meanwhile(|line| line.send(&bytes)).await.unwrap();
    run.hear(&peer::ack(channel, 8, true), 8).await.unwrap();
    for (ticket, outcome) in run.outcomes() {
        let expected = if [1, 3, 4, 6, 8].contains(&ticket) { no_route() } else { Outcome::Confirmed };
        assert_eq!(outcome, expected, "{ticket}");
    }
}

/// Goal: an outcome is told when it is known, whatever is still open of the messages around it.
#[tokio::test(flavor = "multi_thread")]
async fn outcomes_wait_for_no_other_message() {
    let mut run = Run::open().await;
    let channel = run.line.channel;
    let messages = run.deliver(&envelopes(5)).await;
    let returns = [1, 3].map(|index| peer::returned(channel, &messages[index], || 9)).concat();
    run.meanwhile(|line| line.send(&returns)).await.unwrap();
    run.hear(&peer::ack(channel, 5, false), 1).await.unwrap();
    run.hear(&peer::ack(channel, 4, false), 2).await.unwrap();
    run.hear(&peer::nack(channel, 3, false), 3).await.unwrap();
    assert_eq!(run.told, [(5, Outcome::Confirmed), (4, no_route()), (3, Outcome::Nacked)]);
    run.hear(&peer::ack(channel, 2, true), 5).await.unwrap();
    assert_eq!((&run.outcomes()[&1], &run.outcomes()[&2]), (&Outcome::Confirmed, &no_route()));
}

/// Goal: a return followed by a nack is no confirm, and a return without its ack settles nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_return_settles_nothing_by_itself() {
    let mut run = Run::with(Script::default(), |options| options.confirm_timeout = Duration::from_millis(500)).await;
    let channel = run.line.channel;
    let messages = run.deliver(&envelopes(2)).await;
    let bytes = [peer::returned(channel, &messages[0], || 4), peer::nack(channel, 1, false)].concat();
    run.meanwhile(|line| line.send(&bytes)).await.unwrap();
    let returned = peer::returned(channel, &messages[1], || 4);
    run.meanwhile(|line| line.send(&returned)).await.unwrap();
    let error = run.end().await;
    assert!(matches!(error, BrokerError::TimedOut { .. }), "{error}");
    let outcomes = run.outcomes();
    assert!(!outcomes.contains_key(&2) && outcomes.get(&1).is_none_or(|outcome| *outcome != Outcome::Confirmed));
}

/// Goal: an answer to what was not asked ends the session by name; nothing is told that was not so.
#[tokio::test(flavor = "multi_thread")]
async fn confirms_of_nothing_end_the_session() {
    let mut stranger = sized(1, 10);
    stranger.position.offset = 99;
    let mut away = Run::open().await;
    let unknown = away.deliver(&[stranger]).await.remove(0);
    let channel = away.line.channel;
    let last = peer::ack(channel, 4, false);
    let cases = [
        ("an ack of a tag to come", peer::ack(channel, 5, false)),
        ("a nack of a tag to come", peer::nack(channel, 5, false)),
        ("a multiple ack to a tag to come", peer::ack(channel, 900, true)),
        ("a multiple nack to a tag to come", peer::nack(channel, u64::MAX, true)),
        ("an ack told already", peer::ack(channel, 1, false)),
        ("a nack of what was acked", peer::nack(channel, 2, false)),
        ("an ack of tag 0", peer::ack(channel, 0, false)),
        ("a return nobody published", [peer::returned(channel, &unknown, || 10), last].concat()),
    ];
    let session = async |name: &str, bytes: Vec<u8>| {
        let mut run = Run::open().await;
        run.deliver(&envelopes(4)).await;
        let settled = [1, 2, 3].map(|tag| peer::ack(channel, tag, false)).concat();
        run.hear(&settled, 3).await.unwrap();
        run.line.send(&bytes).await;
        let error = run.end_within(AT_ONCE).await;
        let named = matches!(error, Some(BrokerError::ConnectionLost(_) | BrokerError::ChannelClosed { .. }));
        let told = run.outcomes();
        // The ack behind the return was right.
        let right = told.len() == 3 || name.starts_with("a return");
        drop(run.publisher);
        soon("the hang-up", run.line.end()).await;
        (!named || !right).then(|| format!("{name}: {error:?}; {told:?}"))
    };
    let sessions = cases.into_iter().map(|(name, bytes)| Box::pin(session(name, bytes)));
    let wrong: Vec<_> = futures_util::future::join_all(sessions).await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Goal: a broker that closes channel or connection is quoted, what it confirmed before counts, the rest does not, and it
/// gets its close-ok.
#[tokio::test(flavor = "multi_thread")]
async fn closes_in_mid_stream_lose_no_confirm_and_invent_none() {
    let cases = [
        (true, 404, "NOT_FOUND - no exchange 'oncebox' in vhost 'v'"),
        (true, 406, "PRECONDITION_FAILED - message size 200 larger than configured max size 100"),
        (true, 403, "ACCESS_REFUSED - access to exchange 'oncebox' refused"),
        (false, 320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'"),
        (false, 501, "FRAME_ERROR - type 2, all octets"),
        (false, 504, "CHANNEL_ERROR - expected 'channel.open'"),
        (false, 505, "UNEXPECTED_FRAME - expected content header"),
        (false, 530, "NOT_ALLOWED - vhost 'v' is deleted"),
        (false, 541, "INTERNAL_ERROR"),
    ];
    let mut unanswered = Vec::new();
    for (of_channel, code, text) in cases {
        for glued in [true, false] {
            let mut run = Run::open().await;
            let channel = run.line.channel;
            let messages = run.deliver(&envelopes(6)).await;
            let close =
                if of_channel { peer::channel_close(channel, code, text) } else { peer::connection_close(code, text) };
            let confirms = [peer::ack(channel, 2, true), peer::nack(channel, 5, false)].concat();
            if glued {
                let returned = [peer::returned(channel, &messages[2], || 3), peer::ack(channel, 3, true)].concat();
                run.line.send(&[confirms, returned, close].concat()).await;
            } else {
                run.hear(&confirms, 3).await.unwrap();
                run.line.send(&close).await;
            }
            let error = run.end().await;
            match &error {
                BrokerError::ChannelClosed { code: told, text: words } => {
                    assert!(of_channel && (*told, words.as_str()) == (code, text), "{error}");
                }
                BrokerError::ConnectionLost(words) => {
                    assert!(!of_channel && words.contains(&code.to_string()) && words.contains(text), "{error}");
                }
                _ => panic!("{code}: {error}"),
            }
            let right = BTreeMap::from([
                (1, Outcome::Confirmed),
                (2, Outcome::Confirmed),
                (3, no_route()),
                (5, Outcome::Nacked),
            ]);
            let outcomes = run.outcomes();
            assert!(
                outcomes.iter().all(|(ticket, outcome)| right.get(ticket) == Some(outcome)),
                "{code}: {outcomes:?}"
            );
            let (class, method) = if of_channel { (20, 41) } else { (10, 51) };
            let answered = tokio::time::timeout(AT_ONCE / 4, run.line.hears(class, method)).await;
            if answered != Ok(true) {
                unanswered.push((code, glued));
            }
            drop(run.publisher);
            soon("the hang-up", run.line.end()).await;
        }
    }
    assert!(unanswered.is_empty(), "no close-ok to (code, glued): {unanswered:?}");
}

/// Goal: an alarm stops the clock, shows, and ends without loss; a caller that was busy meanwhile is told no timeout.
#[tokio::test(flavor = "multi_thread")]
async fn blocked_sessions_stop_the_clock() {
    let limit = Duration::from_millis(600);
    let mut run = Run::with(Script::default(), |options| options.confirm_timeout = limit).await;
    let channel = run.line.channel;
    run.deliver(&envelopes(2)).await;
    run.line.send(&peer::blocked("low on memory")).await;
    soon("the alarm", async {
        while !run.publisher.is_blocked() {
            let tick = tokio::time::timeout(Duration::from_millis(1), run.publisher.outcomes(&mut run.told)).await;
            tick.unwrap_or(Ok(())).unwrap();
        }
    })
    .await;
    let waited = tokio::time::timeout(3 * limit, run.publisher.outcomes(&mut run.told)).await;
    assert!(waited.is_err(), "{waited:?} while blocked");
    // A broker may still confirm what it had.
    run.hear(&peer::ack(channel, 1, false), 1).await.unwrap();
    assert!(run.publisher.is_blocked());
    run.line.send(&peer::unblocked()).await;
    soon("the end of the alarm", async {
        while run.publisher.is_blocked() {
            let tick = tokio::time::timeout(Duration::from_millis(1), run.publisher.outcomes(&mut run.told)).await;
            tick.unwrap_or(Ok(())).unwrap();
        }
    })
    .await;
    run.hear(&peer::ack(channel, 2, false), 2).await.unwrap();
    // Both ends of an alarm while the caller was elsewhere: the message's time begins at the second.
    run.deliver(&[envelope(3)]).await;
    run.line.send(&peer::blocked("low on disk")).await;
    tokio::time::sleep(2 * limit).await;
    run.line.send(&peer::unblocked()).await;
    let early = tokio::time::timeout(limit / 2, run.publisher.outcomes(&mut run.told)).await;
    assert!(early.is_err(), "{early:?} just after the alarm");
    run.hear(&peer::ack(channel, 3, false), 3).await.unwrap();
    assert_eq!(run.outcomes(), (1..=3).map(|ticket| (ticket, Outcome::Confirmed)).collect());
    // And then the clock goes again.
    run.deliver(&[envelope(4)]).await;
    let error = run.end().await;
    assert!(matches!(error, BrokerError::TimedOut { .. }), "{error}");
}

/// Goal: a caller that was elsewhere for longer than a confirm may take finds the confirms that came meanwhile, not a
/// timeout; what it left unwritten counts from when it is written.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_caller_is_told_no_timeout() {
    let limit = Duration::from_millis(300);
    let mut run = Run::with(Script::default(), |options| options.confirm_timeout = limit).await;
    run.deliver(&envelopes(3)).await;
    run.line.send(&peer::ack(run.line.channel, 3, true)).await;
    tokio::time::sleep(2 * limit).await;
    run.until_told(3).await.unwrap();
    let Run { mut publisher, line, mut told, peer: _peer } = run;
    tokio::spawn(line.confirm_all());
    publisher.publish(4, &envelope(4)).await.unwrap();
    tokio::time::sleep(2 * limit).await;
    while told.len() < 4 {
        soon("the confirm", publisher.outcomes(&mut told)).await.unwrap();
    }
}

/// Goal: while the broker blocks and reads nothing, a session takes a bounded amount, hangs no publish, and loses nothing
/// of it.
#[tokio::test(flavor = "multi_thread")]
async fn blocked_and_unread_sessions_are_bounded() {
    const BODY_BYTES: usize = 64 * 1024;
    let script = Script { receive_buffer_bytes: Some(16 * 1024), ..Script::default() };
    let mut run = Run::with(script, |options| options.confirm_timeout = Duration::from_secs(2)).await;
    let channel = run.line.channel;
    run.line.send(&peer::blocked("low on memory")).await;
    soon("the alarm", async {
        while !run.publisher.is_blocked() {
            let tick = tokio::time::timeout(Duration::from_millis(1), run.publisher.outcomes(&mut run.told)).await;
            tick.unwrap_or(Ok(())).unwrap();
        }
    })
    .await;
    let mut published = 0;
    while run.publisher.capacity() > 0 {
        published += 1;
        soon("a publish while blocked", run.publisher.publish(published as u64, &sized(published, BODY_BYTES)))
            .await
            .unwrap();
        assert!(published as usize * BODY_BYTES < 64 * 1024 * 1024, "64 MiB went into a session that is blocked");
    }
    let waited = tokio::time::timeout(Duration::from_millis(300), run.publisher.outcomes(&mut run.told)).await;
    assert!(waited.is_err() && run.publisher.unconfirmed() == published as usize, "{waited:?}");
    run.line.send(&peer::unblocked()).await;
    let messages = run
        .meanwhile(|line| async move {
            let messages = line.messages(published as usize).await;
            line.send(&peer::ack(channel, published as u64, true)).await;
            messages
        })
        .await
        .unwrap();
    run.until_told(published as usize).await.unwrap();
    for (message, n) in messages.iter().zip(1..) {
        assert!(message.body == sized(n, BODY_BYTES).message.body, "message {n}");
    }
    assert!(run.told.iter().all(|(_, outcome)| *outcome == Outcome::Confirmed) && run.publisher.capacity() > 0);
}

/// Goal: a broker that falls silent at any step of the handshake costs the connect timeout, and no connection stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_silent_in_the_handshake_times_out() {
    let steps =
        [Step::Greeting, Step::StartOk, Step::Open, Step::ChannelOpen, Step::ExchangeDeclare, Step::ConfirmSelect];
    for step in steps {
        let peer = Peer::start(Script { instead: Some((step, Vec::new())), ..Script::default() }).await;
        let broker = broker(&peer, |options| options.connect_timeout = Duration::from_millis(200));
        let error = soon("the attempt", broker.publisher(EXCHANGE)).await.err().expect("nobody answers");
        assert!(matches!(error, BrokerError::TimedOut { .. }), "{step:?}: {error}");
        soon(&format!("the end of the attempt at {step:?}"), async {
            while peer.serving() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

/// Goal: a broker that ends the connection at any step of the handshake is no hang, and worth another attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_hangs_up_in_the_handshake_is_unreachable() {
    let steps =
        [Step::Greeting, Step::StartOk, Step::Open, Step::ChannelOpen, Step::ExchangeDeclare, Step::ConfirmSelect];
    for step in steps {
        for bytes in
            [vec![], peer::method(0, 10, 10, &[0; 900])[..500].to_vec(), b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()]
        {
            let script = Script { instead: Some((step, bytes)), then_hang_up: true, ..Script::default() };
            let peer = Peer::start(script).await;
            let error = soon("the attempt", broker(&peer, |_| {}).publisher(EXCHANGE)).await.err().expect("it hung up");
            assert!(
                matches!(error, BrokerError::Unreachable { .. } | BrokerError::ConnectionLost(_)),
                "{step:?}: {error}"
            );
        }
    }
}

/// Goal: who may not come in is told so, with the broker's words; nobody tries that again and again.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_named() {
    let close = |code, text| Some((code, text));
    let cases = [
        (
            Step::StartOk,
            close(403, "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN"),
            "password",
        ),
        (Step::Open, close(530, "NOT_ALLOWED - vhost v not found"), "add_vhost"),
        (Step::Open, close(530, "NOT_ALLOWED - access to vhost 'v' refused for user 'guest'"), "set_permissions"),
        // Nothing to do with the vhost: no advice about it.
        (Step::StartOk, close(530, "NOT_ALLOWED - negotiated frame_max = 4096 is lower than the minimum"), "frame_max"),
    ];
    for (step, close, mend) in cases {
        let (code, text) = close.unwrap();
        let instead = Some((step, peer::connection_close(code, text)));
        let peer = Peer::start(Script { instead, ..Script::default() }).await;
        let error = soon("the refusal", broker(&peer, |_| {}).publisher(EXCHANGE)).await.err().expect("it is refused");
        assert!(matches!(error, BrokerError::AccessRefused { .. }) && !error.is_transient(), "{text}: {error}");
        assert!(error.to_string().contains(text) && error.to_string().contains(mend), "{error}");
        assert_eq!(error.to_string().contains("add_vhost"), text.contains("vhost"), "{error}");
    }
    let closes = [
        (
            Step::ExchangeDeclare,
            403,
            "ACCESS_REFUSED - access to exchange 'oncebox' in vhost 'v' refused for user 'guest'",
        ),
        (
            Step::ExchangeDeclare,
            406,
            "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'oncebox' in vhost 'v'",
        ),
    ];
    for (step, code, text) in closes {
        let instead = Some((step, peer::channel_close(1, code, text)));
        let peer = Peer::start(Script { instead, ..Script::default() }).await;
        let error = soon("the refusal", broker(&peer, |_| {}).publisher(EXCHANGE)).await.err().expect("it is refused");
        assert!(matches!(error, BrokerError::AccessRefused { .. } | BrokerError::Topology { .. }), "{error}");
        assert!(!error.is_transient() && error.to_string().contains(text), "{error}");
    }
    for header in [b"AMQP\x00\x00\x09\x01", b"AMQP\x03\x01\x00\x00", b"AMQP\x01\x01\x00\x0a"] {
        let script =
            Script { instead: Some((Step::Greeting, header.to_vec())), then_hang_up: true, ..Script::default() };
        let peer = Peer::start(script).await;
        let error =
            soon("the refusal", broker(&peer, |_| {}).publisher(EXCHANGE)).await.err().expect("another version");
        assert!(matches!(error, BrokerError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains("AMQP"), "{error}");
    }
    // A broker closing for a moment's reason is worth another attempt.
    for (code, text) in [
        (320, "CONNECTION_FORCED - shutdown"),
        (530, "NOT_ALLOWED - access to vhost 'v' refused for user 'guest': connection limit (1) is reached"),
        (530, "NOT_ALLOWED - connection refused for user 'guest': user connection limit (1) is reached"),
    ] {
        let instead = Some((Step::Open, peer::connection_close(code, text)));
        let peer = Peer::start(Script { instead, ..Script::default() }).await;
        let error = soon("the refusal", broker(&peer, |_| {}).publisher(EXCHANGE)).await.err().expect("it is closing");
        assert!(error.is_transient() && error.to_string().contains(text), "{error}");
        assert!(!error.to_string().contains("add_vhost"), "{error}");
    }
}

/// Goal: what the broker says in one breath with the end of the handshake is heard, with nothing after it.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_with_the_handshake_is_heard() {
    for said in [peer::connection_close(320, "CONNECTION_FORCED - shutdown"), peer::blocked("low on memory")] {
        let instead = Some((Step::ConfirmSelect, [peer::method(1, 85, 11, &[]), said].concat()));
        let peer = Peer::start(Script { instead, ..Script::default() }).await;
        let mut publisher = soon("the session", broker(&peer, |_| {}).publisher(EXCHANGE)).await.unwrap();
        let heard = soon("a word of the broker's", async {
            while !publisher.is_blocked() {
                let tick = Duration::from_millis(10);
                if let Ok(told) = tokio::time::timeout(tick, publisher.outcomes(&mut Vec::new())).await {
                    return told;
                }
            }
            Ok(())
        })
        .await;
        assert!(
            heard.is_ok() == publisher.is_blocked()
                && heard.err().is_none_or(|error| error.to_string().contains("CONNECTION_FORCED"))
        );
    }
}

/// Goal: a frame_max asked for is raised to what RabbitMQ takes, where the broker's own allows for it.
#[tokio::test(flavor = "multi_thread")]
async fn frames_are_no_smaller_than_rabbitmq_takes() {
    for (theirs, ours, settled) in
        [(131_072, 4096, 8192), (131_072, 10_000, 10_000), (8192, 100, 8192), (4096, 8192, 4096), (0, 4096, 8192)]
    {
        let script = Script { frame_max: theirs, ..Script::default() };
        let run = Run::with(script, |options| options.url += &format!("&frame_max={ours}")).await;
        assert_eq!(run.line.tuned.1, settled, "{theirs} and {ours}");
    }
}

/// Goal: a broker that takes no password is told of by name, and the password is not sent to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_without_plain_is_named() {
    let peer = Peer::start(Script { mechanisms: "EXTERNAL SCRAM-SHA-256", ..Script::default() }).await;
    let error = soon("the refusal", broker(&peer, |_| {}).publisher(EXCHANGE)).await.err().expect("no PLAIN");
    assert!(!error.is_transient() && error.to_string().contains("PLAIN"), "{error}");
}

/// Goal: a broker that reads but confirms nothing costs the confirm timeout; then the connection is dead, and nothing
/// arrives of what is published after or was left unwritten.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stops_confirming_times_out() {
    let limit = Duration::from_millis(500);
    let mut run = Run::with(Script::default(), |options| options.confirm_timeout = limit).await;
    let channel = run.line.channel;
    let since = Instant::now();
    run.deliver(&envelopes(3)).await;
    // An answer for a newer one is no excuse for the oldest.
    run.line.send(&peer::ack(channel, 2, false)).await;
    let error = run.end().await;
    assert!(matches!(error, BrokerError::TimedOut { limit: told, .. } if told == limit), "{error}");
    assert!(since.elapsed() >= limit && since.elapsed() < 10 * limit, "noticed after {:?}", since.elapsed());
    assert!(run.outcomes().keys().all(|ticket| *ticket == 2));
    assert!(run.publisher.publish(4, &envelope(4)).await.is_err());
    assert_eq!(soon("the hang-up", run.line.end()).await.len(), 0, "messages came after the timeout");
}

/// Goal: a broker that stops reading costs the confirm timeout, wherever the session was; what was not written then never
/// is, however much the broker reads later.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stops_reading_times_out() {
    let limit = Duration::from_millis(700);
    let script = Script { receive_buffer_bytes: Some(16 * 1024), ..Script::default() };
    let mut run = Run::with(script, |options| options.confirm_timeout = limit).await;
    let (mut published, since) = (0, Instant::now());
    let error = soon("the end of the session", async {
        loop {
            let taken = if run.publisher.capacity() > 0 {
                published += 1;
                run.publisher.publish(published as u64, &sized(published, 64 * 1024)).await
            } else {
                run.publisher.outcomes(&mut run.told).await
            };
            if let Err(error) = taken {
                return error;
            }
        }
    })
    .await;
    assert!(matches!(error, BrokerError::TimedOut { .. }), "{error}");
    assert!(since.elapsed() < 20 * limit, "noticed after {:?}", since.elapsed());
    assert!(published * 64 * 1024 < 128 * 1024 * 1024, "{published} messages went in");
    let late = soon("the hang-up", run.line.end()).await;
    // What the system still held is thrown away with the session: no more comes than lay on the peer's side.
    assert!(late.len() <= 1, "{} of {published} messages arrived after the timeout", late.len());
    assert!(run.told.is_empty() && run.publisher.publish(1, &envelope(1)).await.is_err());
}

/// Goal: with heartbeats agreed, a broker that says nothing is lost long before a confirm is overdue, idle or not.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_lost_by_its_heartbeats() {
    let silence = |publish: bool| async move {
        let mut run = Run::with(Script { heartbeat_s: 1, ..Script::default() }, |_| {}).await;
        assert_eq!(run.line.tuned.2, 1);
        let since = Instant::now();
        if publish {
            run.deliver(&envelopes(3)).await;
        }
        let error = run.end().await;
        assert!(matches!(error, BrokerError::ConnectionLost(_)), "{error}");
        let after = since.elapsed();
        assert!(after >= Duration::from_secs(1) && after < Duration::from_secs(10), "noticed after {after:?}");
        soon("the hang-up", run.line.end()).await;
    };
    tokio::join!(silence(false), silence(true));
}

/// Goal: a session that is waited on sends its heartbeats, and one that publishes without pause too: neither is cut by a
/// broker that cuts who is silent for two intervals.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_keep_themselves_alive() {
    const INTERVALS: u64 = 5;
    let script = || Script { heartbeat_s: 1, ..Script::default() };
    let idle = async {
        let mut run = Run::with(script(), |_| {}).await;
        let beats = run
            .meanwhile(|line| async move {
                let (mut beats, until) = (0, Instant::now() + Duration::from_secs(INTERVALS));
                while Instant::now() < until {
                    line.send(&peer::heartbeat()).await;
                    match tokio::time::timeout(Duration::from_secs(2), line.seen()).await {
                        Ok(Some(peer::Seen::Heartbeat)) => beats += 1,
                        other => panic!("{other:?} instead of a heartbeat"),
                    }
                }
                beats
            })
            .await
            .unwrap();
        assert!(beats >= INTERVALS - 2, "{beats} heartbeats");
        run.deliver(&envelopes(1)).await;
        run.hear(&peer::ack(run.line.channel, 1, false), 1).await.unwrap();
    };
    let busy = async {
        let Run { mut publisher, mut line, mut told, peer: _peer } =
            Run::with(script(), |options| options.max_unconfirmed = 50).await;
        let confirming = tokio::spawn(async move {
            let mut confirmed = 0;
            loop {
                match tokio::time::timeout(Duration::from_secs(2), line.seen()).await {
                    Ok(Some(peer::Seen::Message(message))) => {
                        confirmed += 1;
                        line.send(&peer::ack(line.channel, message.tag, false)).await;
                    }
                    Ok(Some(peer::Seen::Method { class: 10, method: 50 })) => {
                        line.send(&peer::method(0, 10, 51, &[])).await;
                        return confirmed;
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("it hung up"),
                    Err(_) => panic!("silent for two intervals"),
                }
            }
        });
        let (mut n, until) = (0, Instant::now() + Duration::from_secs(INTERVALS));
        while Instant::now() < until {
            if publisher.capacity() == 0 {
                soon("a confirm", publisher.outcomes(&mut told)).await.unwrap();
            } else {
                n += 1;
                publisher.publish(n as u64, &envelope(n)).await.unwrap();
            }
        }
        while told.len() < n as usize {
            soon("a confirm", publisher.outcomes(&mut told)).await.unwrap();
        }
        publisher.close().await;
        assert_eq!(soon("the peer", confirming).await.unwrap(), n as usize);
    };
    tokio::join!(idle, busy);
}

/// Goal: bodies are cut at the agreed frame size to the octet, from none to 16 MiB, and messages between them are whole.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_cut_at_the_frame_size() {
    for frame_max in [8192, 131_072] {
        bodies_are_cut_at(frame_max).await;
    }
}

/// Goal: the smallest frame size the protocol allows is kept to.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_cut_at_the_smallest_frame_size() {
    bodies_are_cut_at(4096).await;
}

async fn bodies_are_cut_at(frame_max: u32) {
    let mut run = Run::with(Script { frame_max, ..Script::default() }, |_| {}).await;
    assert_eq!(run.line.tuned.1, frame_max);
    let most = frame_max as usize - peer::FRAME_OVERHEAD;
    let sizes = [0, 1, most - 1, most, most + 1, 2 * most, 2 * most + 1, 0, 16 * 1024 * 1024, 3];
    let all: Vec<_> = sizes.iter().zip(1..).map(|(bytes, n)| sized(n, *bytes)).collect();
    let messages = run.deliver(&all).await;
    for (message, sent) in messages.iter().zip(&all) {
        let bytes = sent.message.body.len();
        assert!(message.body == sent.message.body, "a body of {bytes} bytes");
        let mut frames = vec![most; bytes / most];
        frames.extend((bytes % most > 0).then_some(bytes % most));
        assert!(message.body_frames == frames, "{bytes} bytes in frames of {:?}", message.body_frames);
    }
    run.hear(&peer::ack(run.line.channel, all.len() as u64, true), all.len()).await.unwrap();
}

/// Goal: headers that fit no frame are refused by name, before the broker sees anything of them and closes everybody's
/// connection; a new session is none the worse.
#[tokio::test(flavor = "multi_thread")]
async fn headers_over_the_frame_size_are_refused() {
    let script = Script { frame_max: 8192, ..Script::default() };
    let mut run = Run::with(script.clone(), |options| options.confirm_timeout = Duration::from_secs(1)).await;
    let mut large = envelope(1);
    large.message.headers = json!({"large": "x".repeat(8_200)}).as_object().unwrap().clone();
    let error = match soon("the refusal", run.publisher.publish(1, &large)).await {
        Ok(()) => run.end().await,
        Err(error) => error,
    };
    let BrokerError::ChannelClosed { code, text } = &error else { panic!("{error}") };
    // The relay parks what was refused with 406, and sends anything else again and again.
    assert!(*code == 406 && text.contains("header"), "{error}");
    drop(run.publisher);
    assert_eq!(soon("the hang-up", run.line.end()).await.len(), 0);
    let mut run = Run::with(script, |_| {}).await;
    let mut fits = envelope(1);
    fits.message.headers = json!({"large": "x".repeat(7_000)}).as_object().unwrap().clone();
    assert_eq!(run.deliver(&[fits]).await[0].headers()["large"].1.len(), 7_000);
    run.hear(&peer::ack(run.line.channel, 1, false), 1).await.unwrap();
}

/// Goal: a peer that does not speak AMQP ends the session at once, with what it confirmed before and nothing else, and
/// without the memory that it claims to need.
#[tokio::test(flavor = "multi_thread")]
async fn broken_frames_end_the_session() {
    let channel = 1;
    let mut wrong_end = peer::ack(channel, 2, false);
    *wrong_end.last_mut().unwrap() = 0xcd;
    let huge = |size: u32| [&[peer::METHOD, 0, 1][..], &size.to_be_bytes(), &[0, 60]].concat();
    let cases = [
        ("garbage", vec![b'x'; 300], false),
        ("zeros", vec![0; 64], false),
        ("a wrong end octet", wrong_end, false),
        ("a frame over the agreed size", peer::frame(peer::BODY, channel, &vec![7; 131_072]), false),
        ("a frame of 4 GiB", huge(0xffff_fff0), false),
        ("a frame of 1 GiB", huge(0x4000_0000), false),
        ("an unknown frame type", peer::frame(9, channel, &[]), false),
        ("an unknown class", peer::method(channel, 99, 1, &[]), false),
        ("an unknown method", peer::method(channel, 60, 999, &[]), false),
        ("a method cut short", peer::frame(peer::METHOD, channel, &[0, 60, 0, 80, 0]), false),
        ("a method on another channel", peer::ack(7, 2, false), false),
        ("a confirm on channel 0", peer::ack(0, 2, false), false),
        ("connection.blocked on a channel", peer::method(channel, 10, 60, &[0]), false),
        ("a header without a method", peer::header(channel, 5, &[0, 0]), false),
        ("a body without a header", peer::frame(peer::BODY, channel, b"body"), false),
        (
            "a method inside a return",
            [&peer::method(channel, 60, 50, b"\x01\x38\0\0\0")[..], &peer::ack(channel, 2, false)].concat(),
            false,
        ),
        (
            "a body over its header's size",
            [
                peer::method(channel, 60, 50, b"\x01\x38\0\0\0"),
                peer::header(channel, 3, &[0, 0]),
                peer::frame(peer::BODY, channel, b"12345"),
            ]
            .concat(),
            false,
        ),
        ("an end between frames", Vec::new(), true),
        ("an end within a frame", peer::ack(channel, 2, false)[..9].to_vec(), true),
        ("an end within a return", peer::method(channel, 60, 50, b"\x01\x38\0\0\0"), true),
    ];
    let session = async |name: &str, bytes: Vec<u8>, hang_up: bool| {
        let mut run = Run::open().await;
        assert_eq!(run.line.channel, channel);
        run.deliver(&envelopes(2)).await;
        run.line.send(&[peer::ack(channel, 1, false), bytes].concat()).await;
        if hang_up {
            tokio::io::AsyncWriteExt::shutdown(&mut run.line.stream).await.unwrap();
        }
        let error = run.end_within(AT_ONCE).await;
        let told = run.outcomes();
        let right = told.iter().all(|told| told == (&1, &Outcome::Confirmed));
        let named = matches!(error, Some(BrokerError::ConnectionLost(_) | BrokerError::ChannelClosed { .. }));
        drop(run.publisher);
        soon("the hang-up", run.line.end()).await;
        (!named || !right).then(|| format!("{name}: {error:?}; {told:?}"))
    };
    // Boxed: together they are too much for a test's stack.
    let sessions = cases.into_iter().map(|(name, bytes, hang_up)| Box::pin(session(name, bytes, hang_up)));
    let wrong: Vec<_> = futures_util::future::join_all(sessions).await.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(peak_memory_bytes() < 3 << 30, "{} bytes of memory", peak_memory_bytes());
}

fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Goal: `outcomes` may be dropped wherever it waits, in the middle of a write and of a frame too: nothing is lost, told
/// twice or sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn dropped_outcomes_lose_nothing() {
    for seed in 0..4 {
        let script = Script { receive_buffer_bytes: Some(4 * 1024), frame_max: 4096, ..Script::default() };
        let Run { mut publisher, mut line, mut told, peer: _peer } = Run::with(script, |_| {}).await;
        let count = 300;
        let peer = tokio::spawn(async move {
            let mut random = Random(seed);
            let mut messages = Vec::new();
            for _ in 0..count {
                let message = line.messages(1).await.remove(0);
                let mut answer = Vec::new();
                if message.tag % 5 == 0 {
                    answer.extend(peer::returned(line.channel, &message, || 100));
                }
                answer.extend(peer::ack(line.channel, message.tag, false));
                line.send_in_pieces(&answer, || 1 + random.below(600)).await;
                messages.push(message);
            }
            (messages, line)
        });
        let mut random = Random(seed + 100);
        let (mut sent, all) =
            (0, (1..=count).map(|n| sized(n, if n % 7 == 0 { 30_000 } else { 10 })).collect::<Vec<_>>());
        soon("all outcomes", async {
            while told.len() < all.len() {
                if sent < all.len() && publisher.capacity() > 0 && random.below(3) > 0 {
                    publisher.publish(sent as u64 + 1, &all[sent]).await.unwrap();
                    sent += 1;
                }
                let mut polls = random.below(3);
                let mut outcomes = pin!(publisher.outcomes(&mut told));
                let some = std::future::poll_fn(|cx| match outcomes.as_mut().poll(cx) {
                    std::task::Poll::Ready(result) => std::task::Poll::Ready(Some(result)),
                    std::task::Poll::Pending if polls == 0 => std::task::Poll::Ready(None),
                    std::task::Poll::Pending => {
                        polls -= 1;
                        cx.waker().wake_by_ref();
                        std::task::Poll::Pending
                    }
                });
                if let Some(result) = some.await {
                    result.unwrap();
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
        let (messages, _line) = soon("the peer", peer).await.unwrap();
        assert!(messages.iter().zip(&all).all(|(message, sent)| message.body == sent.message.body));
        told.sort_by_key(|(ticket, _)| *ticket);
        for ((ticket, outcome), n) in told.iter().zip(1..) {
            let expected = if n % 5 == 0 { no_route() } else { Outcome::Confirmed };
            assert_eq!((*ticket, outcome), (n, &expected));
        }
    }
}

/// Goal: a session dropped in the middle of a write leaves no connection, whether the broker reads or not.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_dropped_in_a_write_ends_its_connection() {
    for frozen in [true, false] {
        let script = Script { receive_buffer_bytes: Some(4 * 1024), ..Script::default() };
        let mut run = Run::with(script, |_| {}).await;
        let large = (1..=3).map(|n| sized(n, 4 * 1024 * 1024)).collect::<Vec<_>>();
        let Run { publisher, told, .. } = &mut run;
        let writing = publish_all(publisher, told, &large);
        assert!(tokio::time::timeout(Duration::from_millis(200), writing).await.map_or(true, |sent| sent.is_ok()));
        let _ = tokio::time::timeout(Duration::from_millis(10), publisher.outcomes(told)).await;
        drop(run.publisher);
        if frozen {
            // What the kernel took may still come; the rest may not.
            tokio::time::sleep(Duration::from_millis(2_500)).await;
        }
        let messages = soon("the hang-up", run.line.end()).await;
        assert!(!frozen || messages.len() < 3, "all was sent by a session long dropped");
        soon("the end of the other connections", async {
            while run.peer.serving() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

/// Goal: `close` says goodbye in order to a broker that answers, and takes no more than a moment with one that does not.
#[tokio::test(flavor = "multi_thread")]
async fn close_is_orderly_and_bounded() {
    let mut run = Run::open().await;
    run.deliver(&envelopes(2)).await;
    let (goodbye, ()) = tokio::join!(soon("the goodbye", run.line.hears(10, 50)), async {
        let closing = Instant::now();
        soon("the close", run.publisher.close()).await;
        assert!(closing.elapsed() < Duration::from_secs(4), "{:?} for a peer that does not answer", closing.elapsed());
    });
    assert!(goodbye);
    soon("the hang-up", run.line.end()).await;
}

fn queue(name: &str, binding: &str) -> QueueSpec {
    QueueSpec {
        name: name.to_owned(),
        exchange: EXCHANGE.to_owned(),
        bindings: vec![binding.to_owned()],
        single_active_consumer: false,
        voids: false,
    }
}

/// Publishes until the end of all or of the session; answers the outcomes told by ticket and the error.
async fn push(publisher: &mut impl Publisher, all: &[Envelope]) -> (BTreeMap<u64, Outcome>, Option<BrokerError>) {
    let (mut told, mut sent) = (Vec::new(), 0);
    let error = loop {
        let done = if sent < all.len() && publisher.capacity() > 0 {
            sent += 1;
            publisher.publish(all[sent - 1].position.offset as u64, &all[sent - 1]).await
        } else if publisher.unconfirmed() > 0 {
            soon("an outcome", publisher.outcomes(&mut told)).await
        } else {
            break None;
        };
        if let Err(error) = done {
            break Some(error);
        }
    };
    (told.into_iter().collect(), error)
}

/// Goal: on RabbitMQ, a network cut at any moment under load ends the session at once, and what was confirmed is there.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_a_cut_network_loses_nothing_confirmed() {
    let node = rabbit().await;
    let url = node.url(&node.fresh_vhost().await);
    let proxy = Proxy::to(node.0.port()).await;
    let direct = RabbitMq::new(RabbitMqOptions::new(&url)).unwrap();
    let through = RabbitMq::new(RabbitMqOptions::new(proxy.instead_of(&url, node.0.port()))).unwrap();
    drop(direct.subscribe(&queue("q", "t.*"), 1).await.unwrap());
    let mut confirmed = BTreeSet::new();
    for round in 0..4 {
        let mut publisher = through.publisher(EXCHANGE).await.unwrap();
        let all: Vec<_> = (1..=20_000).map(|n| envelope(n + round * 20_000)).collect();
        let pushing = push(&mut publisher, &all);
        let cutting = async {
            tokio::time::sleep(Duration::from_millis(5 + 30 * round as u64)).await;
            proxy.cut();
        };
        let ((told, error), ()) = tokio::join!(soon("the end", pushing), cutting);
        if told.len() < all.len() {
            assert!(matches!(error, Some(BrokerError::ConnectionLost(_))), "{error:?}");
        }
        assert!(told.values().all(|outcome| *outcome == Outcome::Confirmed));
        confirmed.extend(told.into_keys());
    }
    let mut subscription = direct.subscribe(&queue("q", "t.*"), 500).await.unwrap();
    while !confirmed.is_empty() {
        let delivery = soon("what was confirmed", subscription.next()).await.unwrap();
        confirmed.remove(&(delivery.position().unwrap().offset as u64));
        subscription.ack(delivery.tag).await.unwrap();
    }
}

/// Goal: on RabbitMQ, an alarm amid large bodies blocks the session without its memory growing, and loses none of them.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_an_alarm_amid_large_bodies_is_bounded() {
    let node = own_rabbit().await;
    let url = node.url(&node.fresh_vhost().await);
    let mut options = RabbitMqOptions::new(&url);
    options.confirm_timeout = Duration::from_secs(2);
    let broker = RabbitMq::new(options).unwrap();
    drop(broker.subscribe(&queue("q", "t.*"), 1).await.unwrap());
    let mut publisher = broker.publisher(EXCHANGE).await.unwrap();
    let (mut told, mut sent) = (Vec::new(), 0);
    polled(&mut publisher, &mut told, node.ctl(&["set_vm_memory_high_watermark", "0"])).await.unwrap();
    soon("the alarm", async {
        while !publisher.is_blocked() {
            if publisher.capacity() > 0 {
                sent += 1;
                publisher.publish(sent as u64, &sized(sent, 256 * 1024)).await.unwrap();
            }
            let tick = tokio::time::timeout(Duration::from_millis(5), publisher.outcomes(&mut told)).await;
            tick.unwrap_or(Ok(())).unwrap();
        }
    })
    .await;
    let before = sent;
    while publisher.capacity() > 0 {
        sent += 1;
        soon("a publish while blocked", publisher.publish(sent as u64, &sized(sent, 256 * 1024))).await.unwrap();
        assert!(sent - before < 256, "64 MiB went into a session that is blocked");
    }
    let waited = tokio::time::timeout(Duration::from_secs(3), publisher.outcomes(&mut told)).await;
    assert!(waited.is_err() && publisher.is_blocked(), "{waited:?} while blocked");
    // Polled meanwhile: a session that is left alone for longer than its heartbeats ends.
    let ended = node.ctl(&["set_vm_memory_high_watermark", "0.4"]);
    polled(&mut publisher, &mut told, ended).await.unwrap();
    while publisher.unconfirmed() > 0 {
        soon("an outcome", publisher.outcomes(&mut told)).await.unwrap();
    }
    assert!(told.len() == sent as usize && told.iter().all(|(_, outcome)| *outcome == Outcome::Confirmed));
    publisher.close().await;
}

/// Goal: a broker at an IPv6 address is reached there, for publishing and for consuming.
#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_is_reached_over_ipv6() {
    // Not every machine has it.
    let Ok(listener) = tokio::net::TcpListener::bind("[::1]:0").await else { return };
    let node = rabbit().await;
    let direct = node.url(&node.fresh_vhost().await);
    let (port, behind) = (listener.local_addr().unwrap().port(), node.0.port());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = tokio::net::TcpStream::connect(("127.0.0.1", behind)).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
        }
    });
    let url = direct.replace(&format!("127.0.0.1:{behind}"), &format!("[::1]:{port}"));
    let broker = RabbitMq::new(RabbitMqOptions::new(url)).unwrap();
    let mut subscription = soon("a subscription", broker.subscribe(&queue("q", "t.*"), 1)).await.unwrap();
    let mut publisher = soon("a session", broker.publisher(EXCHANGE)).await.unwrap();
    assert_eq!(push(&mut publisher, &envelopes(1)).await.0, BTreeMap::from([(1, Outcome::Confirmed)]));
    soon("the message", subscription.next()).await.unwrap();
}
