//! The order in which the parts of the missing records are read.

use tierstream_io::Priority;

use crate::plan::Stage;
use crate::residency::Step;

/// Reads of missing records, stage by stage and group by group.
///
/// Loads start in the order in which they are computed, each as soon as the group that last used
/// its slots has been computed in that stage. The parts of different stages lie in different
/// memory, so with one or two groups everything starts at once; and if a record is one piece of the
/// file, all its parts then come with one read.
pub(super) struct Loads {
    /// The parts that each stage reads; if there is but one entry, the first reads all.
    stages: Vec<Vec<usize>>,
    groups: usize,
    /// Groups that may be in the slots at one time.
    turns: usize,
    /// Loads started, in order; index = stage * groups + group.
    started: Vec<usize>,
    /// Groups computed, per stage.
    computed: Vec<usize>,
}

impl Loads {
    pub(super) fn new(stages: &[Stage], step: &mut Step) -> Self {
        let groups = step.arriving();
        let shared = groups.len() > 1
            && groups[0].iter().any(|p| groups[1].iter().any(|q| p.slot == q.slot));
        let turns = if shared { 1 } else { 2 };
        let parts = |stage: &Stage| stage.ops.iter().map(|op| op.part).collect();
        let mut parts: Vec<Vec<usize>> = stages.iter().map(parts).collect();
        // Else a group's slots are needed for the next one in one stage, and not yet in another.
        if step.in_one_piece() && groups.len() <= turns {
            parts = vec![parts.concat()];
        }
        let mut this = Self {
            started: Vec::with_capacity(parts.len() * groups.len()),
            stages: parts,
            groups: groups.len(),
            turns,
            computed: vec![0; stages.len()],
        };
        this.start(step);
        this
    }

    fn start(&mut self, step: &mut Step) {
        while self.started.len() < self.stages.len() * self.groups {
            let (stage, group) =
                (self.started.len() / self.groups, self.started.len() % self.groups);
            if group >= self.computed[stage] + self.turns {
                break;
            }
            self.started.push(step.load(&self.stages[stage], group, Priority::Demand));
        }
    }

    /// The load of a group for a stage, which has been started.
    pub(super) fn of(&self, stage: usize, group: usize) -> usize {
        self.started[stage.min(self.stages.len() - 1) * self.groups + group]
    }

    pub(super) fn computed(&mut self, step: &mut Step, stage: usize, group: usize) {
        self.computed[stage] = group + 1;
        self.start(step);
    }
}
