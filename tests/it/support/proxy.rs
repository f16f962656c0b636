//! A TCP proxy on loopback whose connections can be cut at any byte.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Passes bytes on to a server until told to cut.
pub struct Proxy {
    port: u16,
    server: Arc<AtomicU16>,
    cuts: Arc<watch::Sender<u32>>,
}

impl Proxy {
    pub async fn to(server: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let cuts = Arc::new(watch::channel(0).0);
        let sender = Arc::clone(&cuts);
        let target = Arc::new(AtomicU16::new(server));
        let server = Arc::clone(&target);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut cut = sender.subscribe();
                let server = server.load(Ordering::SeqCst);
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        // Both ends are dropped in the middle of whatever they were saying.
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Self { port, server: target, cuts }
    }

    /// The URL of a server, by way of the proxy.
    pub fn instead_of(&self, url: &str, server: u16) -> String {
        url.replace(&format!(":{server}/"), &format!(":{}/", self.port))
    }

    /// New connections lead to another server.
    pub fn lead_to(&self, server: u16) {
        self.server.store(server, Ordering::SeqCst);
    }

    /// Cuts every connection there is.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}
