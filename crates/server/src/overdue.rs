//! Answers that their clients do not take.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures_util::{Stream, stream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use crate::job::Event;

/// Least time for what has been computed of an answer to be taken, where others wait for its model to go.
const TAKE_TIME: Duration = Duration::from_secs(10);

/// Time beyond the deadline, in which a client that takes its answer is told of it.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);

/// When an answer is given up, whether or not its client takes what there is of it.
pub(crate) struct Overdue {
    pub(crate) deadline: Instant,
    /// Whether its model is to go.
    pub(crate) retires: watch::Receiver<bool>,
    /// What computes it, if it is not all there.
    pub(crate) computing: Option<mpsc::WeakUnboundedSender<Event>>,
}

impl Overdue {
    async fn wait(self) {
        let Self { deadline, mut retires, computing } = self;
        let is_computed = || computing.as_ref().is_none_or(|of| of.strong_count() == 0);
        let is_in_the_way = async {
            loop {
                if retires.wait_for(|&retires| retires).await.is_err() {
                    // It is gone, and nobody waits for it.
                    std::future::pending::<()>().await;
                }
                let was_computed = is_computed();
                sleep(TAKE_TIME).await;
                if was_computed && *retires.borrow() {
                    return;
                }
            }
        };
        drop(timeout_at(deadline + LAST_WORDS_TIME, is_in_the_way).await);
    }

    /// What comes of `answer` until then. What it has is given up then, although nobody asks for more of it: a server
    /// asks only as fast as its client takes what there is.
    pub(crate) fn cut<T: 'static>(
        self,
        answer: impl Stream<Item = T> + Send + 'static,
    ) -> impl Stream<Item = io::Result<T>> + Send + 'static {
        let answer: Shared<T> = Arc::new(Mutex::new(Some(Box::pin(answer))));
        let weak = Arc::downgrade(&answer);
        let watch = Watch(tokio::spawn(async move {
            self.wait().await;
            if let Some(answer) = weak.upgrade() {
                let given_up = lock(&answer).take();
                drop(given_up);
            }
        }));
        stream::poll_fn(move |context| {
            // It goes with the answer.
            let _ = &watch;
            match lock(&answer).as_mut() {
                Some(answer) => answer.as_mut().poll_next(context).map(|next| next.map(Ok)),
                None => Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into()))),
            }
        })
    }
}

type Shared<T> = Arc<Mutex<Option<Pin<Box<dyn Stream<Item = T> + Send>>>>>;

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A task that ends when this is dropped.
struct Watch(JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use tokio::sync::oneshot::{self, error::TryRecvError};

    use super::*;

    struct Case {
        overdue: Overdue,
        retires: watch::Sender<bool>,
        computing: mpsc::UnboundedSender<Event>,
    }

    fn case(deadline: Duration) -> Case {
        let (retires, retirement) = watch::channel(false);
        let (computing, _) = mpsc::unbounded_channel();
        let overdue = Overdue {
            deadline: Instant::now() + deadline,
            retires: retirement,
            computing: Some(computing.downgrade()),
        };
        Case { overdue, retires, computing }
    }

    /// An answer that nobody takes, and what tells that it is given up.
    fn untaken(overdue: Overdue) -> (impl Stream, oneshot::Receiver<()>) {
        let (held, given_up) = oneshot::channel();
        (overdue.cut(stream::unfold(held, |held| async { Some(((), held)) })), given_up)
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn what_nobody_takes_ends_at_the_deadline() {
        let Case { overdue, retires: _retires, computing: _computing } = case(HOUR);
        let (answer, given_up) = untaken(overdue);
        let start = Instant::now();
        given_up.await.expect_err("it is dropped");
        assert_eq!(start.elapsed(), HOUR + LAST_WORDS_TIME);
        drop(answer);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_computed_makes_room_for_others() {
        let Case { overdue, retires, computing } = case(HOUR);
        let (answer, mut given_up) = untaken(overdue);
        retires.send_replace(true);
        // It is not computed yet.
        sleep(TAKE_TIME * 5 / 2).await;
        assert_eq!(given_up.try_recv(), Err(TryRecvError::Empty));
        drop(computing);
        let start = Instant::now();
        given_up.await.expect_err("it is dropped");
        assert!((TAKE_TIME..=2 * TAKE_TIME).contains(&start.elapsed()));
        let mut answer = std::pin::pin!(answer);
        assert!(answer.next().await.is_some(), "an error");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_in_nobodys_way_is_left_alone() {
        let Case { overdue, retires, computing } = case(HOUR);
        drop(computing);
        let (answer, given_up) = untaken(overdue);
        let start = Instant::now();
        retires.send_replace(true);
        sleep(TAKE_TIME / 2).await;
        // Another model has gone.
        retires.send_replace(false);
        given_up.await.expect_err("it is dropped");
        assert!(start.elapsed() >= HOUR);
        drop(answer);
    }
}
