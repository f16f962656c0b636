//! RabbitMQ as the broker's conformance suite sees it.

use super::{folder, shared_nodes, unique};
use oncebox::node::{Rabbit, RabbitOptions};

/// A node, shared or one's own.
pub struct TestRabbit(pub Rabbit);

/// The shared node: for everything that touches a vhost only.
pub async fn rabbit() -> TestRabbit {
    TestRabbit(Rabbit::attach(shared_nodes()).await.expect("the shared RabbitMQ runs"))
}

/// A node of one's own: for what starves or stops the whole broker.
pub async fn own_rabbit() -> TestRabbit {
    TestRabbit(Rabbit::start(&folder("rabbit"), RabbitOptions::default()).await.expect("RabbitMQ starts"))
}

impl TestRabbit {
    pub fn url(&self, vhost: &str) -> String {
        self.0.url(vhost)
    }

    pub async fn fresh_vhost(&self) -> String {
        let name = unique("vhost");
        self.0.add_vhost(&name).await.expect("a vhost");
        name
    }

    pub async fn ctl(&self, args: &[&str]) -> String {
        self.0.ctl(args).await.unwrap_or_else(|error| panic!("rabbitmqctl {args:?}: {error}"))
    }

    pub fn freeze(&mut self) {
        self.0.freeze();
    }

    pub fn thaw(&mut self) {
        self.0.thaw();
    }

    pub fn kill9(&mut self) {
        self.0.kill9();
    }

    pub async fn restart(&mut self) {
        self.0.restart().await.expect("RabbitMQ restarts");
    }
}
