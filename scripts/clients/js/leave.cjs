// Leaves in the middle of an answer, with the client that is named, and asks for another one.
const { OpenAI } = require('openai')
const { Ollama } = require('ollama')

const { user } = require('./says.cjs')

const clients = {
  async openai() {
    const client = new OpenAI({ baseURL: process.env.SERVER + '/v1', apiKey: 'none', maxRetries: 0 })
    const chat = (text, stream) => client.chat.completions.create({ model: 'one', messages: user(text), stream })
    const stream = await chat('x'.repeat(1000), true)
    for await (const chunk of stream) if (chunk) break
    return (await chat('y', false)).choices[0].message.content
  },
  async ollama() {
    const client = new Ollama({ host: process.env.SERVER })
    const stream = await client.chat({ model: 'one', messages: user('x'.repeat(1000)), stream: true })
    for await (const part of stream) if (part) break
    stream.abort()
    return (await client.chat({ model: 'one', messages: user('y') })).message.content
  },
}

clients[process.argv[2]]().then((said) => console.log(said))
