// Runs beside the page, in the sound's own thread.

// Microphone to int16 pieces of about 100 ms, at the device's own rate, with the loudest sample of each.
class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.samples = new Int16Array(Math.round(sampleRate / 10));
    this.count = 0;
    this.peak = 0;
  }

  process(inputs) {
    const channels = inputs[0];
    if (!channels.length) return true;
    for (let i = 0; i < channels[0].length; i++) {
      let value = 0;
      for (const channel of channels) value += channel[i];
      value /= channels.length;
      this.peak = Math.max(this.peak, Math.abs(value));
      this.samples[this.count++] = Math.max(-32768, Math.min(32767, Math.round(value * 32768)));
      if (this.count === this.samples.length) {
        const samples = this.samples;
        this.port.postMessage({ samples, peak: this.peak }, [samples.buffer]);
        this.samples = new Int16Array(Math.round(sampleRate / 10));
        this.count = this.peak = 0;
      }
    }
    return true;
  }
}

// Pieces of speech one behind the other without gaps between them; says what it has played.
class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];
    this.at = 0;
    this.played = 0;
    this.told = 0;
    this.port.onmessage = ({ data }) => {
      if (data === "clear") { this.queue = []; this.at = 0; } else this.queue.push(data);
    };
  }

  process(_, outputs) {
    const out = outputs[0][0];
    let i = 0;
    while (i < out.length && this.queue.length) {
      const piece = this.queue[0];
      const count = Math.min(out.length - i, piece.length - this.at);
      out.set(piece.subarray(this.at, this.at + count), i);
      i += count;
      this.at += count;
      if (this.at === piece.length) { this.queue.shift(); this.at = 0; }
    }
    for (let c = 1; c < outputs[0].length; c++) outputs[0][c].set(out);
    this.played += i;
    if (this.played - this.told > sampleRate / 20 || (this.told < this.played && !this.queue.length)) {
      this.told = this.played;
      this.port.postMessage({ played: this.played, time: currentTime });
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
registerProcessor("player", Player);
