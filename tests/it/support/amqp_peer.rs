//! The server's side of AMQP 0-9-1 by a script: what a publishing session says is read strictly, and a test says byte
//! by byte what it hears. Written by hand from the specification, with nothing of the code or the codec under test.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;

pub const METHOD: u8 = 1;
pub const HEADER: u8 = 2;
pub const BODY: u8 = 3;
pub const HEARTBEAT: u8 = 8;
const FRAME_END: u8 = 0xce;
/// What a session declares before it publishes: the topics' exchange and that of void notices.
const EXCHANGES: usize = 2;
/// Type, channel, size and end octet of a frame.
pub const FRAME_OVERHEAD: usize = 8;

/// What a client says on the way to a publishing session, each waiting for the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Greeting,
    StartOk,
    Open,
    ChannelOpen,
    ExchangeDeclare,
    ConfirmSelect,
}

/// How the server behaves until a session is in confirm mode.
#[derive(Clone)]
pub struct Script {
    pub mechanisms: &'static str,
    pub channel_max: u16,
    pub frame_max: u32,
    pub heartbeat_s: u16,
    /// A small one makes the client's writes partial.
    pub receive_buffer_bytes: Option<u32>,
    /// At this step these bytes are said instead of the answer, and then nothing.
    pub instead: Option<(Step, Vec<u8>)>,
    /// ... or then the connection ends.
    pub then_hang_up: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            mechanisms: "PLAIN AMQPLAIN",
            channel_max: 2047,
            frame_max: 131_072,
            heartbeat_s: 60,
            receive_buffer_bytes: None,
            instead: None,
            then_hang_up: false,
        }
    }
}

/// A listener on loopback for one session. Connections that ask for confirms become [`Line`]s; others are served until they end.
pub struct Peer {
    port: u16,
    lines: mpsc::UnboundedReceiver<Line>,
    serving: Arc<AtomicUsize>,
}

impl Peer {
    pub async fn start(script: Script) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        if let Some(bytes) = script.receive_buffer_bytes {
            socket.set_recv_buffer_size(bytes).expect("a small buffer");
        }
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        let listener = socket.listen(64).expect("it listens");
        let port = listener.local_addr().expect("its address").port();
        let (hand_over, lines) = mpsc::unbounded_channel();
        let serving = Arc::new(AtomicUsize::new(0));
        let (served, declared) = (Arc::clone(&serving), Arc::new(AtomicUsize::new(0)));
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = hand_over.closed() => return,
                };
                let Ok((stream, _)) = accepted else { return };
                stream.set_nodelay(true).expect("a TCP stream");
                let (script, hand_over) = (script.clone(), hand_over.clone());
                let (serving, declared) = (Arc::clone(&served), Arc::clone(&declared));
                serving.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    serve(Line::new(stream), script, declared, hand_over).await;
                    serving.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { port, lines, serving }
    }

    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/v?heartbeat=60", self.port)
    }

    /// The next connection that asked for confirms.
    pub async fn line(&mut self) -> Line {
        self.lines.recv().await.expect("the listener lives as long as the peer")
    }

    /// Connections open that are nobody's [`Line`].
    pub fn serving(&self) -> usize {
        self.serving.load(Ordering::SeqCst)
    }
}

/// Answers as a broker does, up to the confirm mode or the step that the script has another answer for.
async fn serve(
    mut line: Line,
    script: Script,
    declared: Arc<AtomicUsize>,
    hand_over: mpsc::UnboundedSender<Line>,
) -> Option<()> {
    let mut greeting = [0; 8];
    line.stream.read_exact(&mut greeting).await.ok()?;
    assert_eq!(&greeting, b"AMQP\x00\x00\x09\x01", "the protocol header");
    line.answer(&script, Some(Step::Greeting), start(script.mechanisms)).await?;
    loop {
        let frame = line.frame().await?;
        if frame.kind != METHOD {
            assert_eq!((frame.kind, frame.channel), (HEARTBEAT, 0), "content before confirm mode");
            continue;
        }
        let channel = frame.channel;
        let mut args = Reader(&frame.payload);
        let (step, answer) = match (args.u16(), args.u16()) {
            (10, 11) => {
                line.start_ok = frame.payload.clone();
                let mut tune = script.channel_max.to_be_bytes().to_vec();
                tune.extend(script.frame_max.to_be_bytes());
                tune.extend(script.heartbeat_s.to_be_bytes());
                (Some(Step::StartOk), method(0, 10, 30, &tune))
            }
            (10, 31) => {
                line.tuned = (args.u16(), args.u32(), args.u16());
                line.frame_max = line.tuned.1 as usize;
                continue;
            }
            (10, 40) => (Some(Step::Open), method(0, 10, 41, &[0])),
            (10, 50) => {
                line.send(&method(0, 10, 51, &[])).await;
                return None;
            }
            // Whoever was told of a close instead of the answer says close-ok, and we hang up as a broker does.
            (10, 51) => return None,
            (20, 10) => (Some(Step::ChannelOpen), method(channel, 20, 11, &[0; 4])),
            (20, 40) => (None, method(channel, 20, 41, &[])),
            (20, 41) => continue,
            (40, 10) => {
                declared.fetch_add(1, Ordering::SeqCst);
                (Some(Step::ExchangeDeclare), method(channel, 40, 11, &[]))
            }
            (85, 10) => {
                line.channel = channel;
                (Some(Step::ConfirmSelect), method(channel, 85, 11, &[]))
            }
            other => panic!("the session sent method {other:?} before confirm mode"),
        };
        line.answer(&script, step, answer).await?;
        // In whatever order, and the exchanges perhaps on a connection of their own.
        if line.channel > 0 && declared.load(Ordering::SeqCst) >= EXCHANGES {
            return hand_over.send(line).ok();
        }
    }
}

/// A message as it came over the wire.
#[derive(Debug, Clone, Default)]
pub struct Published {
    /// The tag its confirm has.
    pub tag: u64,
    pub exchange: String,
    pub routing_key: String,
    pub mandatory: bool,
    /// Flags and values, as they came.
    pub properties: Vec<u8>,
    pub body: Vec<u8>,
    /// Payload bytes of each body frame.
    pub body_frames: Vec<usize>,
    body_size: Option<usize>,
}

impl Published {
    /// A header's type octet and bytes.
    pub fn headers(&self) -> BTreeMap<String, (u8, Vec<u8>)> {
        let mut properties = Reader(&self.properties);
        let flags = properties.u16();
        for bit in [15, 14] {
            if flags & (1 << bit) != 0 {
                properties.short();
            }
        }
        if flags & (1 << 13) == 0 {
            return BTreeMap::new();
        }
        let size = properties.u32() as usize;
        let mut table = Reader(properties.take(size));
        let mut headers = BTreeMap::new();
        while !table.0.is_empty() {
            let name = table.short();
            let kind = table.take(1)[0];
            let value = match kind {
                b't' | b'b' | b'B' => table.take(1),
                b's' | b'u' => table.take(2),
                b'I' | b'i' | b'f' => table.take(4),
                b'l' | b'L' | b'd' | b'T' => table.take(8),
                b'V' => &[],
                b'S' | b'A' | b'F' | b'x' => {
                    let size = table.u32() as usize;
                    table.take(size)
                }
                other => panic!("header {name} is of type {other}"),
            };
            assert!(headers.insert(name.clone(), (kind, value.to_vec())).is_none(), "header {name} twice");
        }
        headers
    }

    /// The offset that oncebox's header gives.
    pub fn offset(&self) -> i64 {
        let headers = self.headers();
        let (kind, bytes) = &headers["oncebox-offset"];
        assert_eq!(*kind, b'l');
        i64::from_be_bytes(bytes.as_slice().try_into().expect("8 bytes"))
    }
}

/// What a client says on a line in confirm mode.
#[derive(Debug)]
pub enum Seen {
    Message(Published),
    Method { class: u16, method: u16 },
    Heartbeat,
}

/// A frame as it came.
pub struct Frame {
    pub kind: u8,
    pub channel: u16,
    pub payload: Vec<u8>,
}

/// A connection in confirm mode, for the test to play the broker on. It reads only when it is asked to.
pub struct Line {
    pub stream: TcpStream,
    /// The channel in confirm mode.
    pub channel: u16,
    /// `connection.start-ok` as it came.
    pub start_ok: Vec<u8>,
    /// Greatest channel, greatest frame and heartbeat, as the client settled them.
    pub tuned: (u16, u32, u16),
    frame_max: usize,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were read.
    at: usize,
    tag: u64,
    assembling: Option<Published>,
}

impl Line {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            channel: 0,
            start_ok: Vec::new(),
            tuned: (0, 0, 0),
            frame_max: 4096,
            buffer: Vec::new(),
            at: 0,
            tag: 0,
            assembling: None,
        }
    }

    async fn answer(&mut self, script: &Script, step: Option<Step>, answer: Vec<u8>) -> Option<()> {
        match &script.instead {
            Some((at, bytes)) if Some(*at) == step => {
                self.send(bytes).await;
                if !script.then_hang_up {
                    while self.frame().await.is_some() {}
                }
                None
            }
            _ => {
                self.send(&answer).await;
                Some(())
            }
        }
    }

    /// Says these bytes. To one who hung up they are lost.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// Says these bytes in pieces, each on its way before the next.
    pub async fn send_in_pieces(&mut self, bytes: &[u8], mut piece: impl FnMut() -> usize) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
            self.send(now).await;
            rest = later;
            tokio::task::yield_now().await;
        }
    }

    /// The next frame, or none when the client hung up. Cancel safe.
    pub async fn frame(&mut self) -> Option<Frame> {
        loop {
            let unread = &self.buffer[self.at..];
            if unread.len() >= 7 {
                let size = u32::from_be_bytes([unread[3], unread[4], unread[5], unread[6]]) as usize;
                let limit = self.frame_max - FRAME_OVERHEAD;
                assert!(size <= limit, "a frame of type {} with {size} bytes, agreed are {limit}", unread[0]);
                if unread.len() >= size + FRAME_OVERHEAD {
                    assert_eq!(unread[size + 7], FRAME_END, "the end octet of a frame of type {}", unread[0]);
                    let frame = Frame {
                        kind: unread[0],
                        channel: u16::from_be_bytes([unread[1], unread[2]]),
                        payload: unread[7..size + 7].to_vec(),
                    };
                    self.at += size + FRAME_OVERHEAD;
                    return Some(frame);
                }
            }
            self.buffer.drain(..std::mem::take(&mut self.at));
            self.buffer.reserve(64 * 1024);
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// The next thing said, or none when the client hung up. Cancel safe.
    pub async fn seen(&mut self) -> Option<Seen> {
        loop {
            let frame = self.frame().await?;
            let mut reader = Reader(&frame.payload);
            match frame.kind {
                HEARTBEAT => {
                    assert_eq!((frame.channel, frame.payload.len()), (0, 0), "a heartbeat");
                    return Some(Seen::Heartbeat);
                }
                METHOD => {
                    let (class, method) = (reader.u16(), reader.u16());
                    if (class, method) != (60, 40) {
                        return Some(Seen::Method { class, method });
                    }
                    assert_eq!(frame.channel, self.channel, "published on another channel");
                    assert!(self.assembling.is_none(), "a method between a message's frames");
                    assert_eq!(reader.u16(), 0, "the reserved field");
                    self.tag += 1;
                    let mut message = Published { tag: self.tag, ..Published::default() };
                    message.exchange = reader.short();
                    message.routing_key = reader.short();
                    let bits = reader.take(1)[0];
                    assert!(bits <= 1 && reader.0.is_empty(), "the bits of basic.publish: {bits}");
                    message.mandatory = bits == 1;
                    self.assembling = Some(message);
                }
                HEADER => {
                    assert_eq!(frame.channel, self.channel, "a header on another channel");
                    let message = self.assembling.as_mut().expect("a header follows basic.publish");
                    assert!(message.body_size.is_none(), "two headers");
                    assert_eq!((reader.u16(), reader.u16()), (60, 0), "class and weight");
                    message.body_size = Some(reader.u64() as usize);
                    message.properties = reader.0.to_vec();
                }
                BODY => {
                    assert_eq!(frame.channel, self.channel, "a body on another channel");
                    let message = self.assembling.as_mut().expect("a body follows its header");
                    message.body_frames.push(frame.payload.len());
                    message.body.extend_from_slice(&frame.payload);
                    let size = message.body_size.expect("a body follows its header");
                    assert!(message.body.len() <= size, "more body than the header says");
                }
                other => panic!("a frame of type {other}"),
            }
            if self.assembling.as_ref().is_some_and(|message| message.body_size == Some(message.body.len())) {
                return self.assembling.take().map(Seen::Message);
            }
        }
    }

    /// The next `n` messages. Not cancel safe.
    pub async fn messages(&mut self, n: usize) -> Vec<Published> {
        let mut messages = Vec::with_capacity(n);
        while messages.len() < n {
            match self.seen().await {
                Some(Seen::Message(message)) => messages.push(message),
                Some(Seen::Heartbeat) => {}
                other => panic!("{other:?} instead of message {} of {n}", messages.len() + 1),
            }
        }
        messages
    }

    /// Reads on until the client says this method; false if it hung up before.
    pub async fn hears(&mut self, class: u16, method: u16) -> bool {
        loop {
            match self.seen().await {
                Some(Seen::Method { class: c, method: m }) if (c, m) == (class, method) => return true,
                Some(_) => {}
                None => return false,
            }
        }
    }

    /// Reads until the client hangs up, and lets it say goodbye; answers the messages that came meanwhile.
    pub async fn end(&mut self) -> Vec<Published> {
        let mut messages = Vec::new();
        while let Some(seen) = self.seen().await {
            match seen {
                Seen::Message(message) => messages.push(message),
                Seen::Method { class: 10, method: 50 } => self.send(&method(0, 10, 51, &[])).await,
                Seen::Method { .. } | Seen::Heartbeat => {}
            }
        }
        messages
    }

    /// Confirms each message as it comes, until the client hangs up; answers how many there were.
    pub async fn confirm_all(mut self) -> usize {
        let mut confirmed = 0;
        while let Some(seen) = self.seen().await {
            match seen {
                Seen::Message(message) => {
                    confirmed += 1;
                    self.send(&ack(self.channel, message.tag, false)).await;
                }
                Seen::Method { class: 10, method: 50 } => self.send(&method(0, 10, 51, &[])).await,
                Seen::Method { .. } | Seen::Heartbeat => {}
            }
        }
        confirmed
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        taken
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().expect("2 bytes"))
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().expect("4 bytes"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().expect("8 bytes"))
    }

    fn short(&mut self) -> String {
        let size = self.take(1)[0] as usize;
        String::from_utf8(self.take(size).to_vec()).expect("UTF-8")
    }
}

/// A frame, whatever is in it.
pub fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(channel.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes.push(FRAME_END);
    bytes
}

pub fn method(channel: u16, class: u16, method: u16, args: &[u8]) -> Vec<u8> {
    let mut payload = class.to_be_bytes().to_vec();
    payload.extend(method.to_be_bytes());
    payload.extend(args);
    frame(METHOD, channel, &payload)
}

pub fn ack(channel: u16, tag: u64, multiple: bool) -> Vec<u8> {
    let mut args = tag.to_be_bytes().to_vec();
    args.push(u8::from(multiple));
    method(channel, 60, 80, &args)
}

pub fn nack(channel: u16, tag: u64, multiple: bool) -> Vec<u8> {
    let mut args = tag.to_be_bytes().to_vec();
    args.push(u8::from(multiple));
    method(channel, 60, 120, &args)
}

/// `basic.return` of a message, its body in frames of the sizes that `piece` gives.
pub fn returned(channel: u16, message: &Published, mut piece: impl FnMut() -> usize) -> Vec<u8> {
    let mut args = 312_u16.to_be_bytes().to_vec();
    for text in ["NO_ROUTE", &message.exchange, &message.routing_key] {
        short(&mut args, text);
    }
    let mut bytes = method(channel, 60, 50, &args);
    bytes.extend(header(channel, message.body.len(), &message.properties));
    let mut rest = message.body.as_slice();
    while !rest.is_empty() {
        let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
        bytes.extend(frame(BODY, channel, now));
        rest = later;
    }
    bytes
}

pub fn header(channel: u16, body_bytes: usize, properties: &[u8]) -> Vec<u8> {
    let mut payload = vec![0, 60, 0, 0];
    payload.extend((body_bytes as u64).to_be_bytes());
    payload.extend(properties);
    frame(HEADER, channel, &payload)
}

pub fn channel_close(channel: u16, code: u16, text: &str) -> Vec<u8> {
    method(channel, 20, 40, &close_args(code, text))
}

pub fn connection_close(code: u16, text: &str) -> Vec<u8> {
    method(0, 10, 50, &close_args(code, text))
}

pub fn blocked(reason: &str) -> Vec<u8> {
    let mut args = Vec::new();
    short(&mut args, reason);
    method(0, 10, 60, &args)
}

pub fn unblocked() -> Vec<u8> {
    method(0, 10, 61, &[])
}

pub fn heartbeat() -> Vec<u8> {
    frame(HEARTBEAT, 0, &[])
}

fn close_args(code: u16, text: &str) -> Vec<u8> {
    let mut args = code.to_be_bytes().to_vec();
    short(&mut args, text);
    args.extend([0, 60, 0, 40]);
    args
}

/// `connection.start`, as RabbitMQ 3.10 says it.
fn start(mechanisms: &str) -> Vec<u8> {
    let mut capabilities = Vec::new();
    for name in ["publisher_confirms", "basic.nack", "connection.blocked", "authentication_failure_close"] {
        short(&mut capabilities, name);
        capabilities.extend([b't', 1]);
    }
    let mut properties = Vec::new();
    short(&mut properties, "capabilities");
    properties.push(b'F');
    long(&mut properties, &capabilities);
    for (name, value) in [("product", "RabbitMQ"), ("version", "3.10.8")] {
        short(&mut properties, name);
        properties.push(b'S');
        long(&mut properties, value.as_bytes());
    }
    let mut args = vec![0, 9];
    long(&mut args, &properties);
    long(&mut args, mechanisms.as_bytes());
    long(&mut args, b"en_US");
    method(0, 10, 10, &args)
}

fn short(into: &mut Vec<u8>, text: &str) {
    into.push(u8::try_from(text.len()).expect("a short string"));
    into.extend(text.as_bytes());
}

fn long(into: &mut Vec<u8>, bytes: &[u8]) {
    into.extend((bytes.len() as u32).to_be_bytes());
    into.extend(bytes);
}
