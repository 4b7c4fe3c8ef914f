"""tautomer.rewrite: the framework. Knows no paper, no model family, no runtime.

Reading order: a file imports only files above it.

What everything speaks of:

    errors.py       The errors tautomer raises: one base, few kinds, one sentence each
    options.py      What a user gives a recipe or a pass, held to the annotations of what takes it
    claims.py       A claim is what a rewrite promises about outputs and gradients
    _torch.py       Every private name of torch that tautomer uses, and nothing else
    _fla.py         The kernels of flash-linear-attention, where it is installed
    shapes.py       Sizes may be symbols; every comparison of sizes goes through here
    evidence.py     What was measured when a claim was checked, and the one table of tolerances
    expressions.py  An expression over weights: a leaf of the user's model, or an op on expressions
    inverse.py      Solve an edit for one of its leaves
    weights.py      The table of weights: a weight is a leaf of the user's model or an expression over leaves
    printed.py      What rich draws, as text
    memory_plan.py  What was chosen for each block so that the backward keeps no more than a budget
    signature.py    The call of a captured model: its own signature, bound by name, flattened to the graph's inputs
    program.py      A program: an fx graph, its weights, and how it is called
    blocks.py       The blocks of a program: runs of calls that are equal up to names, and what stands between them
    interpret.py    Run a program's graph node by node; promoted to float64 it is the oracle
    flops.py        What a kernel costs: 2 m n k for a product of matrices, by torch's own formulas; else one per entry
    checkpoints.py  Parts of a program that the backward runs again: what they read is kept, and nothing of what they compute
    expected.py     What a captured graph expects of its inputs
    checkpoint.py   Sums over the calls of a calibration, kept in a folder
    calibration.py  Run a program on the user's data; a pass sees the values of chosen nodes
    factors.py      Truncated factors of a matrix under a covariance of what it is applied to
    moments.py      First and second moments of values of a program over the user's data
    refit.py        The factors of a layer whose input is no longer what it was
    divergence.py   How far a program moves when its weights do, on the user's data and without labels
    allocation.py   Which of a few sizes each layer takes, so that all fit a budget
    attention_report.py  What became of the attentions of a model: which form, how far off, and why one was left alone

One vocabulary, and emission in it:

    kernel_attention.py    Attention by a kernel: quadratic, recurrent and in chunks, with decay
    nearest_keys.py        The last keys and values, and attention to them from one position more
    hybrid_attention.py    Softmax over the nearest keys, and a kernel for the rest
    subset_attention.py    Attention over a subset of the keys
    landmark_attention.py  Attention through a few landmarks, which stand for segments of the sequence
    pooling.py      Pooling in the place of attention: means and maxima of all, of a segment, of the neighbours
    library.py      The semantic ops that ATen has no name for: a ``torch.library`` op each, whose body is its meaning
    own_gradient.py An op with its own gradient: what it computes, what its backward keeps, and what it makes of that
    lean.py         Ops that compute what stock ops do and keep less of it for the backward
    ops.py          The vocabulary: ``op.linear(x, W, b)`` means whatever the interpretation ``op`` makes of it
    metadata.py     The metadata of a new node: what the op returns on fake tensors, remembered
    structured.py   A matrix as a product of structured factors: shapes, its product with x, the nearest one, its start
    emit.py         The vocabulary over a graph: nodes, and new weights where it reads weights alone
    compose.py      A small program written in the vocabulary
    substitution.py New nodes stand for old ones: whoever reads them can still run, and nothing else notices

From a model to a program:

    functions.py    What ``torch.export`` makes of an ``autograd.Function``: its forward
    record.py       One eager run of the user's model, which leaves the model as it was
    build.py        An exported program becomes a ``Program``
    functional.py   In-place calls become functional where nothing else sees the memory
    canonical.py    Canonical form, of graphs and of patterns: one spelling per fact
    export.py       ``torch.export`` with free sizes, tried in order
    example.py      The example call, and other calls to try a capture with
    lifted.py       A graph whose parameters are inputs, as torch.compile hands it over, becomes a program
    modes.py        One program for both modes: the train export and the eval export, compared call by call
    capture.py      Capture a model as a program

What a rewrite is, and what it may say:

    measure.py      Programs timed against each other in turns
    target.py       What a target is: where a program will run, and whether a rewrite pays there
    pass_base.py    A pass: one rewrite of a whole program, with a name, a claim and a source
    relations.py    How a value of the rewritten program stands to the value it comes from

Holding a program to a claim:

    samples.py      Inputs to verify on: the example's own values, at other sizes
    gradients.py    Compare the gradients of two programs block by block, through the weight map
    verification.py Hold a rewritten program to its claim
    equivalence.py  Do two models agree? The contract of ``tautomer.verify``, for any two captured programs

Rules: two sides of an equation:

    equation.py     The two sides of a rule, and what its ``where`` may ask of a match
    symbols.py      ``before`` over symbols: variables as their annotations narrow them, calls, spellings
    patterns.py     ``before`` as a matcher that backtracks, and says how far it came
    region.py       The region one application touches, held to its claim
    engine.py       The engine: rules to a fixpoint, each application a transaction
    rules.py        A rule: an equation that rewrites, and can say why it did not
    trial.py        A rule tried without a model: its own left side, in every spelling, is the model

Facts for rewrites of a whole program:

    axes.py         An axis of a tensor, followed through the ops that carry it
    layers.py       Linear layers, convolutions and products with a weight, with a diagonal map on either side
    latency.py      How long a layer takes on a target, dense and in two factors, by rank
    readers.py      Who reads the channels of a value: layers, behind what only moves them
    diagonal.py     A factor and a shift per channel, and the way to the layers around them
    masks.py        A mask that is computed from sizes alone, as the band it keeps
    projections.py  Where a value comes from through views, and whether two are projections of one tensor
    attentions.py   The attentions of a program: what each one reads, and what its mask is made of
    beside.py       New nodes beside old ones, in a copy of a program: what they would compute, on data
    parallel.py     Linear layers that read one tensor: q, k and v, or gate and up
    selection.py    Which rewrites to apply together: a minimum cut
    dominators.py   The smallest part of a program with one way in and one way out
    feedforward.py  The feedforward layers: linear layers on one tensor, an activation or gate, and one back to its width
    residual.py     The residual streams of a program: how wide, who writes them, who reads them
    saved.py        What the backward keeps of the forward, by storage, and which nodes need it
    budget.py       The cheapest choice whose union of needs fits a budget: an exact dynamic program
    streams.py      The mean of a residual stream: who writes it, who would notice its absence

Running them:

    memory_pass.py  A rewrite after which the backward keeps less: where it fits, what is asked, what stands for what
    pipeline.py     Run an ordered tuple of passes on a program, and answer for the result
    effects.py      What each application of some rewrites changes of what the backward keeps
    memory_options.py  What may be chosen for the parts of a program so that its backward keeps less, and what it comes to
    attention_steps.py  How an attention goes on from its past: the state behind the last position, and one position more
    stepping.py     A causal program as a program of one position, state in and out
    drawing.py      A program drawn in layers, as SVG: repeated blocks in one box, colours by kind
    attention_drawing.py  What became of the attentions of a model, as SVG: a bar per attention
    report.py       The report: what fired, what did not and why, how exact, what it cost, whether it paid
"""
