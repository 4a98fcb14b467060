
// A chat over the streaming endpoint, in which every pass of the model shows what was drafted for it.
// Texts of the model and of the user are only ever set as text.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/ /g, "·") || "∅";
  const plural = (number, word) => `${number} ${word}${number === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;

  const log = byId("log"), form = byId("form"), question = byId("question"), send = byId("send"), pass = byId("pass");
  let history = [];
  let model = null;
  let hasTemplate = true;
  let running = null; // the AbortController of the answer that is being generated

  // ----- asking -----

  const headers = () => {
    const key = byId("key").value;
    return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  };

  const fail = async (response) => {
    const said = await response.json().catch(() => null);
    const error = new Error(said?.error?.message ?? `the server answered ${response.status}`);
    error.status = response.status;
    error.code = said?.error?.code;
    throw error;
  };

  // The objects of a stream of server-sent events, as they arrive.
  async function* eventsOf(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        yield chunk;
      }
    }
  }

  const ask = async (signal) => {
    const system = byId("system").value;
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...history];
    const asked = {
      ...(hasTemplate ? { messages } : { prompt: history.map((each) => each.content).join("") }),
      temperature: Number(byId("temperature").value),
      max_tokens: Number(byId("length").value),
      draft: byId("draft").checked,
      stream: true,
      speculation: true,
    };
    const path = hasTemplate ? "v1/chat/completions" : "v1/completions";
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
    if (!response.ok) await fail(response);
    return eventsOf(response.body);
  };

  const askEitherWay = async (signal) => {
    try {
      return await ask(signal);
    } catch (error) {
      if (error.code !== "no_chat_template" || !hasTemplate) throw error;
      hasTemplate = false; // a model that continues texts
      return ask(signal);
    }
  };

  const connect = async () => {
    try {
      const response = await fetch("v1/models", { headers: headers() });
      if (!response.ok) await fail(response);
      model = (await response.json()).data[0].id;
      byId("model").textContent = model;
    } catch (error) {
      byId("model").textContent = error.status === 401 ? "needs an API key" : "not reachable";
      if (error.status === 401) askForKey();
    }
  };

  const askForKey = () => {
    byId("settings").open = true;
    byId("key").focus();
  };

  // ----- one answer -----

  class Answer {
    constructor() {
      this.steps = [];
      this.tokens = this.drafted = this.accepted = 0;
      this.firstTokens = 0;
      this.content = "";
      this.turn = make("article", "turn answer");
      this.text = make("div", "text waiting");
      this.facts = make("p", "facts");
      this.turn.append(make("p", "who", model ?? "model"), this.text, this.facts);
      this.text.addEventListener("keydown", (event) => this.move(event));
      log.append(this.turn);
    }

    add(chunk) {
      const choice = chunk.choices[0];
      if (!choice) return;
      this.content += choice.delta ? choice.delta.content ?? "" : choice.text;
      if (choice.finish_reason) this.reason = choice.finish_reason;
      const step = choice.speculation;
      if (!step || !step.tokens.length) return;
      const now = performance.now();
      if (!this.steps.length) {
        this.started = now;
        this.firstTokens = step.tokens.length;
      }
      this.last = now;
      this.tokens += step.tokens.length;
      this.drafted += step.tree.tokens.length - 1;
      this.accepted += step.accepted;
      this.draw(step);
      this.measure();
    }

    draw(step) {
      const index = this.steps.push(step) - 1;
      const span = make("span", "step");
      span.tabIndex = index === 0 ? 0 : -1;
      span.setAttribute("role", "button");
      step.tokens.forEach((token, i) => span.append(make("span", `token ${i < step.accepted ? "accepted" : "own"}`, token.text)));
      for (const event of ["mouseenter", "focus", "click"]) span.addEventListener(event, () => showPass(this, index, span));
      this.text.append(span);
    }

    measure() {
      byId("per-pass").textContent = (this.tokens / this.steps.length).toFixed(2);
      byId("per-second").textContent = this.rate ?? "–";
      byId("accepted").textContent = this.drafted ? `${Math.round((100 * this.accepted) / this.drafted)} %` : "–";
    }

    get rate() {
      const seconds = (this.last - this.started) / 1000;
      return seconds > 0 ? ((this.tokens - this.firstTokens) / seconds).toFixed(1) : null;
    }

    end(note) {
      this.text.classList.remove("waiting");
      if (!this.steps.length && this.content) this.text.textContent = this.content;
      const passes = this.steps.length;
      const parts = passes ? [plural(this.tokens, "token"), plural(passes, "pass"),
        `${(this.tokens / passes).toFixed(2)} tokens per pass`] : [];
      if (this.rate) parts.push(`${this.rate} tokens/s`);
      if (note) parts.push(note);
      else if (this.reason === "length") parts.push("cut at the longest answer");
      this.facts.textContent = parts.join(" · ");
      byId("status").textContent = `The answer is complete: ${parts.join(", ")}.`;
    }

    move(event) {
      const spans = [...this.text.children];
      const at = spans.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (at < 0 || to === undefined || !spans[to]) return;
      event.preventDefault();
      spans[at].tabIndex = -1;
      spans[to].tabIndex = 0;
      spans[to].focus();
    }
  }

  // ----- one pass -----

  const showPass = (answer, index, span) => {
    for (const other of log.querySelectorAll(".chosen")) other.classList.remove("chosen");
    span.classList.add("chosen");
    const step = answer.steps[index];
    const drafted = step.tree.tokens.length - 1;
    byId("pass-title").textContent = `Pass ${index + 1} of ${answer.steps.length}`;
    byId("pass-facts").textContent = `${drafted} drafted, ${step.accepted} accepted, ` +
      `${plural(step.tokens.length, "token")} in ${Math.round(1000 * step.seconds)}\u00a0ms`;
    byId("pass-tree").replaceChildren(drafted ? treeOf(step.tree) : make("p", "", "Nothing was drafted."));
    const own = byId("pass-own");
    own.replaceChildren();
    if (step.tokens.length > step.accepted) {
      const word = make("span", "key own");
      word.append(make("code", "", visible(step.tokens.at(-1).text)));
      own.append("then the model chose ", word);
    }
    pass.hidden = false;
  };

  const treeOf = ({ texts, parents, nodes }) => {
    const kept = new Set(nodes);
    const below = texts.map(() => []);
    parents.forEach((parent, node) => parent >= 0 && below[parent].push(node));
    const list = (node) => {
      const items = make("ul");
      for (const child of below[node]) {
        const item = make("li");
        const word = make("span", `key ${kept.has(child) ? "accepted" : "rejected"}`);
        word.append(make("code", "", visible(texts[child])), make("span", "hidden", kept.has(child) ? " accepted" : " rejected"));
        item.append(word);
        if (below[child].length) item.append(list(child));
        items.append(item);
      }
      return items;
    };
    return list(0);
  };

  const hidePass = () => {
    pass.hidden = true;
    for (const other of log.querySelectorAll(".chosen")) other.classList.remove("chosen");
  };

  // ----- the conversation -----

  const isAtEnd = () => window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 80;
  const toEnd = () => window.scrollTo(0, document.documentElement.scrollHeight);

  const converse = async (text) => {
    byId("welcome").hidden = true;
    hidePass();
    const turn = make("article", "turn question");
    turn.append(make("p", "who", "you"), make("div", "text", text));
    log.append(turn);
    const conversation = history; // another one may begin meanwhile
    conversation.push({ role: "user", content: text });
    running = new AbortController();
    send.textContent = "Stop";
    const answer = new Answer();
    toEnd();
    let note = "";
    try {
      for await (const chunk of await askEitherWay(running.signal)) {
        const follows = isAtEnd();
        answer.add(chunk);
        if (follows) toEnd();
      }
    } catch (error) {
      note = error.name === "AbortError" ? "stopped" : "ended early";
      if (error.name !== "AbortError") {
        const problem = make("p", "problem", error.message);
        problem.setAttribute("role", "alert");
        answer.turn.append(problem);
      }
      if (error.status === 401) askForKey();
    }
    answer.end(note);
    if (answer.content) conversation.push({ role: "assistant", content: answer.content });
    else conversation.pop();
    running = null;
    send.textContent = "Send";
    toEnd();
  };

  const fit = () => {
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight + 2}px`;
    document.documentElement.style.setProperty("--footer", `${document.querySelector("footer").offsetHeight}px`);
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) {
      running.abort();
      return;
    }
    const text = question.value.trim();
    if (!text) return;
    question.value = "";
    fit();
    converse(text);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit();
  });
  question.addEventListener("input", fit);
  for (const idea of document.querySelectorAll(".ideas button")) {
    idea.addEventListener("click", () => !running && converse(idea.textContent));
  }
  byId("clear").addEventListener("click", () => {
    running?.abort();
    history = [];
    log.replaceChildren();
    hidePass();
    byId("welcome").hidden = false;
    question.focus();
  });
  byId("colours").addEventListener("change", (event) => document.body.classList.toggle("colours", event.target.checked));
  byId("key").addEventListener("change", connect);
  byId("options").addEventListener("submit", (event) => event.preventDefault());
  byId("settings").addEventListener("toggle", () => {
    hidePass();
    fit();
  });
  byId("pass-close").addEventListener("click", hidePass);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hidePass());
  document.body.classList.add("colours");
  window.addEventListener("resize", fit);
  fit();
  connect();
})();
